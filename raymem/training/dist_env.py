"""Describes this process's place among the workers of a run, and spreads the model over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from raymem.errors import RaymemError, RecipeError
from raymem.memory.host import lives_on_host
from raymem.recipe.schema import Recipe, ScalingSection

T = TypeVar("T")


@dataclass(frozen=True)
class DistEnv:
    """A process's place; the default is a single process without a process group, as with ``num_workers: 0``."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strategy: str = "ddp"

    @staticmethod
    def current(recipe: Recipe, local_rank: int = 0, device: torch.device | None = None) -> DistEnv:
        """Read where this process stands from its process group, if there is one; see :meth:`of`."""
        return DistEnv.of(recipe.scaling, local_rank, device)

    @staticmethod
    def of(scaling: ScalingSection, local_rank: int = 0, device: torch.device | None = None) -> DistEnv:
        """Read where this process stands from its process group, if there is one.

        Raises:
            RecipeError: ``scaling.use_gpu`` without a CUDA device.
        """
        grouped = dist.is_initialized()
        if device is None:
            device = torch.device("cuda", 0) if scaling.use_gpu else torch.device("cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RecipeError("scaling.use_gpu: true, but PyTorch sees no CUDA device here; set it to false")
        return DistEnv(
            rank=dist.get_rank() if grouped else 0,
            world_size=dist.get_world_size() if grouped else 1,
            local_rank=local_rank,
            device=device,
            strategy=scaling.strategy,
        )

    @property
    def sharded(self) -> bool:
        """Whether parameters are DTensors; FSDP2 on one worker shards trivially and keeps one code path."""
        return self.strategy == "fsdp2"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def max_over_ranks(self, value: int) -> int:
        """Return the largest ``value`` of all ranks, on every rank."""
        if self.world_size == 1:
            return value
        gathered = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(gathered, op=dist.ReduceOp.MAX)
        return int(gathered)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 alone; every rank gets its result, or raises its error.

        The action must take no part in collectives: the other ranks are already waiting for its outcome.
        """
        if self.world_size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as error:  # whatever it is, the others must not wait for it
                outcome[1] = error if isinstance(error, RaymemError) else RuntimeError(f"rank 0: {error!r}")
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def on_all(self, action: Callable[[], T]) -> list[T]:
        """Run ``action`` on every rank; each gets all results in the order of ranks, or raises the first rank's error.

        As with :meth:`on_main`, the action must take no part in collectives.
        """
        if self.world_size == 1:
            return [action()]
        outcome: tuple[T | None, Exception | None]
        try:
            outcome = action(), None
        except Exception as error:  # whatever it is, the others must not wait for it
            outcome = None, error if isinstance(error, RaymemError) else RuntimeError(f"rank {self.rank}: {error!r}")
        outcomes: list[Any] = [None] * self.world_size
        dist.all_gather_object(outcomes, outcome)
        for _, raised in outcomes:
            if raised is not None:
                raise raised
        return [result for result, _ in outcomes]


def shard(model: nn.Module, blocks: list[nn.Module], dist_env: DistEnv) -> None:
    """Shard the model by FSDP2: every transformer block is a unit; the rest (embeddings, head) belongs to the root.

    Works on meta parameters, so that no rank ever holds more than its shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Named explicitly: the default is the machine's accelerator even where the run is to use the CPU.
    mesh = init_device_mesh(dist_env.device.type, (dist_env.world_size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "generate"):  # PEFT's calls the bare model inside, past the root that holds the embeddings
        register_fsdp_forward_method(model, "generate")


def replicate(model: nn.Module, dist_env: DistEnv) -> nn.Module:
    """Wrap a materialised model in DDP; one worker needs none."""
    if dist_env.world_size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    device_ids = [dist_env.device.index] if dist_env.device.type == "cuda" else None
    # What lies on the host is frozen, and DDP takes parameters of one device only.
    on_host = [name for name, parameter in model.named_parameters() if lives_on_host(parameter)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, on_host)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        init_sync=False,  # ranks load or draw the same weights
        broadcast_buffers=False,  # and compute the same buffers
        gradient_as_bucket_view=True,
    )


def bucket_bytes(model: nn.Module) -> int:
    """Count the bytes of DDP's gradient buckets, which stay allocated when gradients are dropped; 0 without DDP."""
    from torch.nn.parallel import DistributedDataParallel

    if not isinstance(model, DistributedDataParallel):
        return 0
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def local_rows(num_rows: int, rank: int, world_size: int) -> slice:
    """Return the rows of dimension 0 that FSDP2 gives to ``rank`` (the split of ``torch.chunk``)."""
    size = -(-num_rows // world_size)
    return slice(min(rank * size, num_rows), min((rank + 1) * size, num_rows))

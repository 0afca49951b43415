"""Takes one optimizer step. It returns tensors, never waits for the device and has no shape that depends on data.

That is what lets the planner trace this very function on fake tensors. The one place where the host looks at values
is ``guard``, which the caller passes in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from raymem.errors import NonFiniteError
from raymem.memory.trace import Phase
from raymem.training.data.batches import Batch
from raymem.training.loss import forward_loss_sum
from raymem.training.optim import Updater

Guard = Callable[[torch.Tensor, torch.Tensor], None]
"""A function that gets loss and gradient norm before anything is written, and raises to stop the run."""


@dataclass(frozen=True)
class StepResult:
    """The result of a step in 0-dim fp32 tensors, equal on every rank."""

    loss: torch.Tensor
    """The mean cross-entropy per target token of the global batch, in nats."""
    grad_norm: torch.Tensor
    """The global L2 norm of the gradients before clipping."""


def finite_guard(loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
    """Stop before a step that would write NaN or infinity.

    Raises:
        NonFiniteError: says which of the two it was.
    """
    values = torch.stack([loss, grad_norm]).tolist()
    for name, value in zip(("loss", "gradient norm"), values, strict=True):
        if not torch.isfinite(torch.tensor(value)):
            raise NonFiniteError(f"{name} is {value}")


def train_step(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    global_targets: int,
    updater: Updater,
    step: int,
    lr: float,
    *,
    clip_norm: float | None = None,
    mixed: bool = False,
    guard: Guard = finite_guard,
    phase: Callable[[Phase], None] = lambda _: None,
) -> StepResult:
    """Forward and backward over the micro-batches of this rank, then one update.

    Args:
        micro_batches: this rank's share of the global batch; every rank has equally many.
        global_targets: target tokens of the global batch over all ranks; the loss is their mean.
        step: number of this step in the run, from 0; seeds what the optimizer draws.
        lr: learning rate of this step.
        clip_norm: limit of the global gradient norm.
        guard: sees loss and gradient norm before the optimizer writes anything.
        phase: told which part begins.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    phase("forward")
    updater.begin(step, lr)
    loss = torch.zeros((), device=micro_batches[0].input_ids.device)
    for index, batch in enumerate(micro_batches):
        with _synchronised(model, last=index == len(micro_batches) - 1):
            # DDP and FSDP2 average gradients over ranks; the loss is a mean over tokens of all of them.
            share = forward_loss_sum(model, batch, mixed=mixed) * (world_size / global_targets)
            torch.autograd.backward(share)
        loss += share.detach()
        del share  # with it go the embeddings of this micro-batch and their gradient
    if world_size > 1:
        dist.all_reduce(loss)
        loss /= world_size

    phase("step")
    grad_norm = updater.grad_norm()
    guard(loss, grad_norm)
    if clip_norm is not None:
        scale = (clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        for gradient in updater.gradients():
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)
    updater.step()
    return StepResult(loss, grad_norm)


@contextlib.contextmanager
def _synchronised(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Reduce gradients over ranks only with the last micro-batch."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    sharded: Any = model
    if hasattr(sharded, "set_requires_gradient_sync"):
        sharded.set_requires_gradient_sync(last)
    yield

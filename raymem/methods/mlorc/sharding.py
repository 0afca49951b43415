"""Row-sharded parameters (FSDP2): local parts, factors as distributed tensors, and sums over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from raymem.linalg.local import local
from raymem.private_apis import FakeTensor


def is_fake(tensor: torch.Tensor) -> bool:
    """Say whether the tensor has a shape but no values."""
    return isinstance(local(tensor), FakeTensor)


def is_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Say whether no rank has NaN or infinity in any of them; waits for the device."""
    norm = torch.nn.utils.get_total_norm(list(tensors))
    return bool(torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm))


def squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    """Sum of squares over all ranks, 0-dim fp32."""
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()


def zero_factors(parameter: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors [M, R] and [R, N] of a zero matrix, spread as the parameter [M, N] is.

    Rows of the left one lie with the parameter's rows, the right one is whole on every rank.

    Raises:
        ValueError: the parameter is not sharded by rows.
    """
    rows, columns = parameter.shape
    part = local(parameter)
    left_MR = part.new_zeros(part.shape[0], rank, dtype=dtype)
    right_RN = part.new_zeros(rank, columns, dtype=dtype)
    if not isinstance(parameter, DTensor):
        return left_MR, right_RN
    mesh, placements = parameter.device_mesh, parameter.placements
    if any(not (p.is_replicate() or p.is_shard(0)) for p in placements):
        raise ValueError(f"MLorc works on row shards; a parameter is placed as {placements}")
    return (
        DTensor.from_local(
            left_MR, mesh, placements, run_check=False, shape=torch.Size((rows, rank)), stride=(rank, 1)
        ),
        DTensor.from_local(right_RN, mesh, [Replicate()] * mesh.ndim),
    )


def sum_over_ranks(parameter: torch.Tensor) -> Callable[[torch.Tensor], object] | None:
    """Add a tensor up, in place, over the ranks that hold other rows of the parameter; None if there are none."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    groups = [mesh.get_group(dim) for dim, placement in enumerate(parameter.placements)
              if isinstance(placement, Shard) and mesh.size(dim) > 1]  # fmt: skip
    if not groups:
        return None

    def add_up(tensor: torch.Tensor) -> None:
        for group in groups:
            dist.all_reduce(tensor, group=group)

    return add_up

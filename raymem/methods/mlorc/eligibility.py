"""Decides which parameters have compressed moments, and counts the bytes that this saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


def is_compressed(name: str, shape: torch.Size, group: Mapping[str, Any]) -> bool:
    """Say whether the moments of a parameter are held as factors: a matrix whose shorter side has ``min_dim`` or more.

    Args:
        shape: shape of the whole parameter, over all ranks.
        group: its parameter group; ``rank: None`` leaves all of the group as it is.

    Raises:
        ValueError: the rank is larger than the shorter side.
    """
    rank, min_dim = group["rank"], group["min_dim"]
    if rank is None or len(shape) != 2 or min(shape) < min_dim:
        return False
    if rank > min(shape):
        raise ValueError(
            f"rank: {rank} is above min(m, n) = {min(shape)} of {name} {list(shape)}; lower it, or raise min_dim "
            f"above {min(shape)} to leave such matrices uncompressed"
        )
    return True


@dataclass(frozen=True)
class StateSummary:
    """Size of the optimizer state, over all ranks."""

    compressed: int
    """Parameters with factors."""
    plain: int
    """Parameters with whole moments."""
    compressed_bytes: int
    plain_bytes: int
    uncompressed_bytes: int
    """Bytes that the compressed ones would take as whole fp32 moments."""

    def __str__(self) -> str:
        return (
            f"MLorc: moments of {self.compressed} matrices compressed to {self.compressed_bytes / 2**20:.1f} MiB from "
            f"{self.uncompressed_bytes / 2**20:.1f}, those of {self.plain} other parameters whole with "
            f"{self.plain_bytes / 2**20:.1f} MiB"
        )

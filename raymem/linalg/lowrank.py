"""A matrix held as the product of two thin factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from raymem.memory.target import worth_visiting

# M rows, N columns, R rank

_FEWEST_ROWS = 8


@dataclass(frozen=True)
class LowRank:
    """``left_MR @ right_RN``; both factors have one dtype and device."""

    left_MR: torch.Tensor
    right_RN: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the product."""
        return self.left_MR.shape[0], self.right_RN.shape[1]

    @property
    def rank(self) -> int:
        return self.right_RN.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the two factors, which have ``R (M + N)`` elements."""
        return sum(factor.numel() * factor.element_size() for factor in (self.left_MR, self.right_RN))

    def reconstruct(self) -> torch.Tensor:
        """Multiply the factors: the whole matrix [M, N]."""
        return self.left_MR @ self.right_RN


def row_chunks(num_rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Yield consecutive row ranges of about ``chunk_bytes`` each, with at least eight rows.

    Working through a matrix by these keeps every temporary as small as a chunk.
    """
    step = max(_FEWEST_ROWS, chunk_bytes // max(1, row_bytes))
    for start in worth_visiting(range(0, num_rows, step)):
        yield slice(start, min(num_rows, start + step))

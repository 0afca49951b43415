"""A matrix held as the product of two thin factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from raymem.memory.target import is_planned

# M rows, N columns, R rank, C rows of a chunk


@dataclass(frozen=True)
class LowRank:
    """``left_MR @ right_RN``; both factors have one dtype and device."""

    left_MR: torch.Tensor
    right_RN: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that the factors stand for."""
        return self.left_MR.shape[0], self.right_RN.shape[1]

    @property
    def rank(self) -> int:
        return self.right_RN.shape[0]

    @property
    def num_bytes(self) -> int:
        """What the two factors hold: ``R (M + N)`` elements."""
        return sum(factor.numel() * factor.element_size() for factor in (self.left_MR, self.right_RN))

    def reconstruct(self) -> torch.Tensor:
        """The whole matrix [M, N]."""
        return self.left_MR @ self.right_RN

    def reconstruct_rows(self, rows: slice) -> torch.Tensor:
        """Some of its rows [C, N], at the cost of those only."""
        return self.left_MR[rows] @ self.right_RN


def row_chunks(num_rows: int, row_bytes: int, chunk_bytes: int, *, least: int = 8) -> Iterator[slice]:
    """Consecutive row ranges of about ``chunk_bytes`` each, of ``least`` rows or more.

    Working through a matrix by these keeps every temporary as small as a chunk. Where a step is only planned, chunks
    are as good as one another: the first two and the last stand for all.
    """
    step = max(least, chunk_bytes // max(1, row_bytes))
    starts: Sequence[int] = range(0, num_rows, step)
    if is_planned() and len(starts) > 3:
        starts = (*starts[:2], starts[-1])
    for start in starts:
        yield slice(start, min(num_rows, start + step))

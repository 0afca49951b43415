"""A matrix held as the product of two thin factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from raymem.memory.target import device_kind, worth_visiting

# M rows, N columns, R rank

_FEW_TERMS, _ROWS_AT_ONCE, _ALIASING_BYTES = 16, 8, 4096


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


def expand_rows(left_CR: torch.Tensor, right_RN: torch.Tensor, out_CN: torch.Tensor) -> torch.Tensor:
    """Write ``left_CR @ right_RN`` into ``out_CN``, fp32, and return that.

    A CPU's first cache has room for few lines whose addresses lie a multiple of 4 KiB apart, and the rows of a block
    do where N is one of 1024, as widths of models like to be. A product with few terms, which does little but write,
    then is four times slower than with eight rows at a time.
    """
    rows, rank = left_CR.shape
    few = rank < _FEW_TERMS and rows % _ROWS_AT_ONCE == 0 and out_CN.is_contiguous()
    if few and device_kind(out_CN.device) == "cpu" and out_CN.shape[1] * out_CN.element_size() % _ALIASING_BYTES == 0:
        parts = rows // _ROWS_AT_ONCE
        left_BSR, out_BSN = left_CR.reshape(parts, _ROWS_AT_ONCE, rank), out_CN.view(parts, _ROWS_AT_ONCE, -1)
        torch.bmm(left_BSR, right_RN.expand(parts, -1, -1), out=out_BSN)
        return out_CN
    return torch.mm(left_CR, right_RN, out=out_CN)


def row_chunks(num_rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Yield consecutive row ranges of about ``chunk_bytes`` each, of eight rows or a multiple of that.

    Working through a matrix by these keeps every temporary as small as a chunk.
    """
    step = max(1, chunk_bytes // max(1, row_bytes) // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
    for start in worth_visiting(range(0, num_rows, step)):
        yield slice(start, min(num_rows, start + step))

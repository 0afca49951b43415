"""QB factorisation of a matrix that is never held whole: its row blocks pass by once."""

from __future__ import annotations

import torch

from raymem.linalg.lowrank import LowRank, row_chunks
from raymem.linalg.orthonormal import whitening
from raymem.linalg.truncate import leading_directions

# M rows, N columns, C rows of a block, K columns of the sketch, R rank that is kept


class StreamingSketch:
    """Sketch of a matrix ``A`` [M, N] for one test matrix, gathered from row blocks in any order.

    With ``Y = A @ test.T`` the QB factorisation needs, beside Y, only ``Z = Y.T @ A`` and ``Y.T @ Y``. Both are sums
    over rows, so ranks that hold different rows of A need to add up no more than those two.

    Args:
        test_KN: test matrix, fp32.
        num_rows: M, or this rank's part of it.
    """

    def __init__(self, test_KN: torch.Tensor, num_rows: int) -> None:
        width, columns = test_KN.shape
        self.test_KN = test_KN
        self.sketch_KM = test_KN.new_empty(width, num_rows)  # lying down: products with few columns are slow on CPUs
        self.sum_KN = test_KN.new_zeros(width, columns)

    def add(self, rows: slice, block_CN: torch.Tensor) -> None:
        """Take in some rows of A, fp32; each row exactly once."""
        sketch_KC = torch.mm(self.test_KN, block_CN.mT, out=self.sketch_KM[:, rows])
        self.sum_KN.addmm_(sketch_KC, block_CN)

    def gram(self) -> torch.Tensor:
        """Return ``Y.T @ Y`` [K, K] of the rows seen, fp64: in fp32 it would lose half of the digits of Y."""
        width, rows = self.sketch_KM.shape
        gram_KK = self.sketch_KM.new_zeros(width, width, dtype=torch.float64)
        for chunk in row_chunks(rows, 8 * width, 1 << 17):
            sketch_KC = self.sketch_KM[:, chunk].double()
            gram_KK.addmm_(sketch_KC, sketch_KC.mT)
        return gram_KK

    def write_factors(self, gram_KK: torch.Tensor, out: LowRank) -> None:
        """Best factors of rank R that the sketch gives, written into ``out`` (any float dtype). It is used up by that.

        Args:
            gram_KK: :meth:`gram`; where rows are spread over ranks it and ``sum_KN`` were added up before.
        """
        del self.test_KN
        whiten_KK = whitening(gram_KK)
        right_KN = whiten_KK.mT @ self.sum_KN
        del self.sum_KN
        directions_KR = leading_directions(right_KN, out.rank)
        out.left_MR.copy_(self.sketch_KM.mT @ (whiten_KK @ directions_KR))
        out.right_RN.copy_(directions_KR.mT @ right_KN)

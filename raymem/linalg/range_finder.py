"""QB factorisation ``A ~ Q @ B``: Q an orthonormal basis of an approximate range of A, B the projection on it.

The test matrix that is multiplied to A (Halko, Martinsson and Tropp 2011) consists of rows of A itself.
"""

from __future__ import annotations

import torch

from raymem.linalg.lowrank import LowRank
from raymem.linalg.orthonormal import orthonormalize

# M rows, N columns, K columns of the sketch


def row_sampled_qb(
    matrix_MN: torch.Tensor, rank: int, generator: torch.Generator, power_iterations: int = 0
) -> LowRank:
    """Return factors of rank ``rank`` in the dtype of the matrix, from a sketch by randomly chosen rows of it (LoRAct,
    row-sampled QB): ``Q = orth(A (A_S)^T)``, ``A ~ Q (Q^T A)``.

    It works on the matrix or its transpose, whichever has fewer rows, so that only thin matrices of the short side are
    orthonormalised. Sampled rows are themselves orthonormalised where nothing else keeps half precision from losing
    the small directions: the sketch has the square of the matrix's condition.

    Args:
        matrix_MN: fp32 or bf16.
        rank: at most min(M, N); at that rank the factors are exact.
        generator: on the CPU; the same rows are chosen whatever the device of the matrix.
        power_iterations: each costs two more products and sharpens a slowly falling spectrum.
    """
    if matrix_MN.shape[0] < matrix_MN.shape[1]:
        flipped = row_sampled_qb(matrix_MN.mT, rank, generator, power_iterations)
        return LowRank(flipped.right_RN.mT, flipped.left_MR.mT)
    # Of the tall matrix the columns are sampled, the rows of its transpose. Products are written so that no operand
    # is walked across its rows, which costs twice as much on CPU.
    chosen_K = torch.randperm(matrix_MN.shape[1], generator=generator)[:rank].to(matrix_MN.device)
    sample_MK = matrix_MN.index_select(1, chosen_K)
    if power_iterations == 0 and matrix_MN.dtype != torch.float32:
        sample_MK = orthonormalize(sample_MK).to(matrix_MN.dtype)
    for _ in range(power_iterations):
        basis_NK = orthonormalize((sample_MK.mT @ matrix_MN).mT).to(matrix_MN.dtype)
        sample_MK = matrix_MN @ basis_NK
    basis_NK = orthonormalize((sample_MK.mT @ matrix_MN).mT).to(matrix_MN.dtype)
    return LowRank(matrix_MN @ basis_NK, basis_NK.mT)

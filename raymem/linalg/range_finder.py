"""QB factorisations ``A ~ Q @ B``: Q an orthonormal basis of an approximate range of A, B the projection on it.

The methods differ in the test matrix that is multiplied to A (Halko, Martinsson and Tropp 2011): Gaussian columns,
rows of A itself, or what an earlier factorisation of a similar matrix found.
"""

from __future__ import annotations

import torch

from raymem.linalg.lowrank import LowRank
from raymem.linalg.orthonormal import orthonormalize

# M rows, N columns, K columns of the sketch


def gaussian_qb(matrix_MN: torch.Tensor, rank: int, generator: torch.Generator, power_iterations: int = 0) -> LowRank:
    """Factors of rank ``rank``, fp32, from a Gaussian sketch.

    Args:
        matrix_MN: any float dtype.
        generator: on the CPU; the same numbers are drawn whatever the device of the matrix.
        power_iterations: each costs two more products and sharpens a slowly falling spectrum.
    """
    test_NK = torch.randn(matrix_MN.shape[1], rank, generator=generator).to(matrix_MN)
    return _project(matrix_MN, test_NK, power_iterations)


def row_sampled_qb(
    matrix_MN: torch.Tensor, rank: int, generator: torch.Generator, power_iterations: int = 0
) -> LowRank:
    """Factors of rank ``rank``, fp32, from a sketch by randomly chosen rows of the matrix (LoRAct, row-sampled QB).

    The rows are orthonormalised first: with that the sketch has the condition of the matrix, not its square, which
    half precision needs.

    Args:
        matrix_MN: any float dtype.
        rank: at most M.
        generator: on the CPU; the same rows are chosen whatever the device of the matrix.
    """
    chosen_K = torch.randperm(matrix_MN.shape[0], generator=generator)[:rank].to(matrix_MN.device)
    return _project(matrix_MN, orthonormalize(matrix_MN[chosen_K].mT).to(matrix_MN.dtype), power_iterations)


def warm_qb(matrix_MN: torch.Tensor, right_KN: torch.Tensor, power_iterations: int = 0) -> LowRank:
    """Factors, fp32, of a matrix that changed little since ``right_KN`` was its right factor: one step of subspace
    iteration from there."""
    norms_K1 = right_KN.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return _project(matrix_MN, (right_KN / norms_K1).mT.to(matrix_MN.dtype), power_iterations)


def _project(matrix_MN: torch.Tensor, test_NK: torch.Tensor, power_iterations: int) -> LowRank:
    basis_MK = orthonormalize(matrix_MN @ test_NK)
    for _ in range(power_iterations):
        inner_NK = orthonormalize(matrix_MN.mT @ basis_MK.to(matrix_MN.dtype))
        basis_MK = orthonormalize(matrix_MN @ inner_NK.to(matrix_MN.dtype))
    return LowRank(basis_MK, (basis_MK.to(matrix_MN.dtype).mT @ matrix_MN).float())

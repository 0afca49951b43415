"""Orthonormal bases of tall thin matrices."""

from __future__ import annotations

import torch

from raymem.memory.target import device_kind

# M rows (many), K columns (few)

_SHIFT = 1e-6
_STRONG_SHIFT = 1e-2
_NEGLIGIBLE = 1e-10
_TINY = torch.finfo(torch.float32).tiny


def orthonormalize(tall_MK: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis [M, K] of the columns of ``tall_MK``, in fp32.

    Householder QR on CPU, where it costs no more than anything else; two passes of Cholesky QR (Fukaya et al. 2014)
    on accelerators, which is matrix products only. Columns that depend on others (or are zero) give some orthonormal
    filling on CPU and vectors of norm up to one elsewhere; neither adds anything to a projection on the basis.
    """
    tall_MK = tall_MK.float()
    if device_kind(tall_MK.device) == "cpu":
        basis_MK: torch.Tensor = torch.linalg.qr(tall_MK).Q
        return basis_MK
    return cholesky_qr(tall_MK, passes=2)


def cholesky_qr(tall_MK: torch.Tensor, passes: int = 2) -> torch.Tensor:
    """Column-scaled, shifted Cholesky QR of fp32 columns; never waits for the device.

    One pass loses half of the digits of badly conditioned columns; the second restores them.
    """
    basis_MK = tall_MK
    for _ in range(passes):
        basis_MK = basis_MK * basis_MK.square().sum(-2, keepdim=True).clamp_min(_TINY).rsqrt()
        factor_KK = cholesky(basis_MK.mT @ basis_MK)
        basis_MK = torch.linalg.solve_triangular(factor_KK, basis_MK.mT, upper=False).mT
    return basis_MK


def cholesky(gram_KK: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor of a Gram matrix with unit diagonal, by a small shift; a strong one where that fails.

    Rounding can leave a Gram matrix of dependent columns slightly indefinite. Which of the two factors is taken is
    decided on the device, so that the host need not wait.
    """
    eye_KK = torch.eye(gram_KK.shape[-1], dtype=gram_KK.dtype, device=gram_KK.device)
    factor_KK, failed = torch.linalg.cholesky_ex(gram_KK + _SHIFT * eye_KK)
    fallback_KK, _ = torch.linalg.cholesky_ex(gram_KK + _STRONG_SHIFT * eye_KK)
    return torch.where((failed != 0)[..., None, None], fallback_KK, factor_KK)


def whitening(gram_KK: torch.Tensor) -> torch.Tensor:
    """Return ``T`` [K, K], fp32, such that the columns of ``Y @ T`` are orthonormal where ``gram_KK = Y.T @ Y`` (fp64).

    This is how a matrix is orthonormalised that is never held whole, only streamed: its Gram matrix is the sum of
    those of its row blocks. Eigenvectors are used because they cannot fail. Directions with an eigenvalue below 1e-10
    of the largest (after every column was scaled to one) are dropped: their columns of ``T`` are zero.
    """
    scale_K = gram_KK.diagonal(dim1=-2, dim2=-1).clamp_min(_TINY).rsqrt()
    values_K: torch.Tensor
    vectors_KK: torch.Tensor
    values_K, vectors_KK = torch.linalg.eigh(gram_KK * scale_K[..., None] * scale_K[..., None, :])
    kept_K = values_K > _NEGLIGIBLE * values_K[..., -1:]
    inverse_root_K = torch.where(kept_K, values_K.clamp_min(_TINY).rsqrt(), 0.0)
    return (scale_K[..., None] * vectors_KK * inverse_root_K[..., None, :]).float()

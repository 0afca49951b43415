"""The best smaller rank of a factorisation."""

from __future__ import annotations

import torch

# K rows of the right factor, N columns, R rank that is kept


def leading_directions(right_KN: torch.Tensor, rank: int) -> torch.Tensor:
    """Left singular vectors [K, R] of a wide matrix with its ``rank`` largest singular values, largest first, fp32.

    For ``A = Q @ right`` with orthonormal ``Q``, ``(Q @ u) @ (u.T @ right)`` is the best approximation of rank R
    (Eckart and Young). Only the small core K x K is decomposed, in fp64.
    """
    core_KK = right_KN.float() @ right_KN.float().mT
    vectors_KK: torch.Tensor = torch.linalg.eigh(core_KK.double()).eigenvectors
    return vectors_KK.flip(-1)[..., :rank].float()

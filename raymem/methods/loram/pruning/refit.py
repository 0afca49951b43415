"""Fits what reads the kept units of a layer to what the whole layer gave.

Attention output and MLP down projection sum up what the units give; where units are gone, those that stay can make up
for a part of it. One least-squares problem for each of these linear layers, over all calibration tokens as the full
model sees them (He et al., arXiv 1707.06168, section 3.1: the reconstruction step of channel pruning).

Legend: O outputs, I inputs, K kept inputs, P pruned inputs.
"""

from __future__ import annotations

import torch

from raymem.errors import ModelError
from raymem.methods.loram.coupling import Coupling

_DAMPING = 0.5
"""Weight of staying where one is, relative to the energy of each input, where there are as many kept inputs as tokens;
fewer for each token need less. On SmolLM2-135M about the best from 768 to 16384 tokens."""
_FLOOR = 1e-6
"""The same for inputs that hardly ever fire, relative to the mean energy."""


def readers(coupling: Coupling) -> tuple[str, ...]:
    """Return the paths of the linear layers whose inputs are units."""
    return tuple(path for path in coupling.linears if coupling.member(path, "in") is not None)


def refitted(weight_OI: torch.Tensor, gram_II: torch.Tensor, kept_K: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the weights [O, K] that give with the kept inputs what the whole layer gave, as nearly as can be.

    They minimise sum_t |W x_t - V x_t[K]|^2 + sum_k d_k |V_k - W_k|^2 with d_k = 0.5 K / T G_kk for T tokens: damping
    that does not depend on the scale of an input, of which some are a thousand times larger than others. Hence
    V = W_K + (solve(G_KK + diag(d), G_KP W_P^T))^T.

    Args:
        weight_OI: any floating dtype; the result has it too.
        gram_II: G, the sum of x x^T over all tokens.
        kept_K: ascending indices of inputs, int64.
        num_tokens: T.

    Raises:
        ModelError: the Gram matrix is not finite.
    """
    if not bool(torch.isfinite(gram_II.diagonal()).all()):
        raise ModelError("calibration: its activations give no usable Gram matrix; use other texts")
    kept_K = kept_K.to(gram_II.device)
    is_pruned_I = torch.ones(len(gram_II), dtype=torch.bool, device=gram_II.device)
    is_pruned_I[kept_K] = False
    rows_KI, weight = gram_II[kept_K], weight_OI.to(gram_II.device, gram_II.dtype)
    missing_KO = (rows_KI[:, is_pruned_I] @ weight[:, is_pruned_I].T).double()
    inner_KK = rows_KI[:, kept_K].double()
    del rows_KI
    energy_K = inner_KK.diagonal().clone()
    if not bool(energy_K.any()):  # nothing ever fired
        return weight_OI[:, kept_K.to(weight_OI.device)]
    inner_KK.diagonal().add_(_DAMPING * len(kept_K) / num_tokens * energy_K + _FLOOR * energy_K.mean())
    change_KO = torch.cholesky_solve(missing_KO, torch.linalg.cholesky(inner_KK))
    return (weight[:, kept_K] + change_KO.T.to(weight.dtype)).to(weight_OI.device, weight_OI.dtype)

"""Zeros in dense weights: n:m and unstructured sparsity by magnitude, Wanda and SparseGPT.

Research modes of the paper (its "Semi" and "Unst"). A linear layer keeps its shape, so nothing is saved in dense form
and recovery is the identity.

Legend: O outputs, I inputs, B columns of a block.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from raymem.errors import ModelError
from raymem.methods.loram.config import Structure

_BLOCK = 128
_DAMPING = 0.01


def magnitude_mask(weight_OI: torch.Tensor, structure: Structure, ratio: Fraction) -> torch.Tensor:
    """Return which weights stay, bool [O, I]: the largest of each n:m block, or of the whole layer.

    Raises:
        ModelError: the inputs do not divide into blocks.
    """
    scores_OI = weight_OI.abs().float()
    if structure == "unstructured":
        return _lowest_go(scores_OI.reshape(1, -1), ratio).view_as(scores_OI)
    return _block_mask(scores_OI, structure)


def wanda_mask(
    weight_OI: torch.Tensor, square_sums_I: torch.Tensor, structure: Structure, ratio: Fraction
) -> torch.Tensor:
    """Return which weights stay, bool [O, I], by abs(w) times the norm of its input (arXiv 2306.11695, eq. (1)).

    Compared inside each n:m block or each output row.

    Args:
        square_sums_I: sums of squares [I] of the inputs over all calibration tokens.

    Raises:
        ModelError: the inputs do not divide into blocks.
    """
    scores_OI = weight_OI.abs().float() * square_sums_I.sqrt().float()
    if structure == "unstructured":
        return _lowest_go(scores_OI, ratio)
    return _block_mask(scores_OI, structure)


def sparsegpt(weight_OI: torch.Tensor, gram_II: torch.Tensor, structure: Structure, ratio: Fraction) -> torch.Tensor:
    """Return the weights [O, I] in fp32 after SparseGPT (arXiv 2301.00774, algorithm 1): zeros, the others moved.

    Blocks of 128 columns, damping of 1 % of the mean diagonal, as its authors' code. Memory: about three fp32 matrices
    [I, I] beside the weight.

    Args:
        weight_OI: any floating dtype.
        gram_II: sum of x x^T over all calibration tokens, fp32; changed in place.

    Raises:
        ModelError: the inputs do not divide into blocks, or the Gram matrix is not finite.
    """
    weight_OI = weight_OI.float().clone()
    inputs = weight_OI.shape[1]
    if structure != "unstructured":
        _check_blocks(inputs, structure)
    diagonal_I = gram_II.diagonal()
    dead_I = diagonal_I == 0  # inputs that never fired
    diagonal_I[dead_I] = 1
    weight_OI[:, dead_I] = 0
    diagonal_I += _DAMPING * diagonal_I.mean()
    try:
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(gram_II))
        factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    except RuntimeError as error:
        raise ModelError(
            f"calibration: its activations give no usable Gram matrix ({error}); use other texts"
        ) from None
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        block_OB = weight_OI[:, start:stop]
        errors_OB = torch.zeros_like(block_OB)
        factor_BB = factor_II[start:stop, start:stop]
        keep_OB = torch.ones_like(block_OB, dtype=torch.bool)
        if structure == "unstructured":
            scores_OB = block_OB.square() / factor_BB.diagonal().square()
            keep_OB = _lowest_go(scores_OB.reshape(1, -1), ratio).view_as(scores_OB)
        for column in range(stop - start):
            if structure != "unstructured":
                num_kept, size = _pattern(structure)
                if column % size == 0:  # blocks of columns are multiples of the pattern
                    ahead = slice(column, column + size)
                    scores = block_OB[:, ahead].square() / factor_BB.diagonal()[ahead].square()
                    keep_OB[:, ahead] = _largest(scores, num_kept)
            value_O, pivot = block_OB[:, column], factor_BB[column, column]
            left_O = torch.where(keep_OB[:, column], value_O, 0.0)
            error_O = (value_O - left_O) / pivot
            block_OB[:, column] = left_O
            block_OB[:, column + 1 :] -= torch.outer(error_O, factor_BB[column, column + 1 :])
            errors_OB[:, column] = error_O
        weight_OI[:, stop:] -= errors_OB @ factor_II[start:stop, stop:]
    return weight_OI


def _pattern(structure: Structure) -> tuple[int, int]:
    num_kept, _, size = structure.partition(":")
    return int(num_kept), int(size)


def _check_blocks(inputs: int, structure: Structure) -> None:
    if inputs % _pattern(structure)[1]:
        raise ModelError(f"structure: {structure} does not divide the {inputs} inputs of a layer; use unstructured")


def _block_mask(scores_OI: torch.Tensor, structure: Structure) -> torch.Tensor:
    num_kept, size = _pattern(structure)
    _check_blocks(scores_OI.shape[1], structure)
    return _largest(scores_OI.view(-1, size), num_kept).view_as(scores_OI)


def _largest(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """bool: the ``num_kept`` largest of each row; of equal ones the first."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :num_kept], True)


def _lowest_go(scores: torch.Tensor, ratio: Fraction) -> torch.Tensor:
    """bool: all but the ``floor(n * ratio)`` smallest of each row of n."""
    size = scores.shape[1]
    return _largest(scores, size - math.floor(size * ratio))

"""How important a unit is: one number per KV group or neuron, summed over all weights that would go with it.

| criterion | of one weight | from |
|---|---|---|
| random | - | LoRAM (arXiv 2502.13533), "Rand" |
| magnitude | w^2 | |
| taylor | abs(w * dL/dw), gradient of the mean loss of the calibration set | LLM-Pruner (arXiv 2305.11627), eq. (5) |
| wanda | abs(w) * norm of the inputs that it multiplies | Wanda (arXiv 2306.11695), eq. (1), summed over units |

Legend: O outputs, I inputs, R rows of a chunk, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from raymem.methods.loram.coupling import Group, Member
from raymem.seeds import generator

_CHUNK_ELEMENTS = 1 << 17
"""Size of the one fp32 buffer that weights pass through, small enough for a core's cache."""


def random_scores(group: Group, layer: int, seed: int) -> torch.Tensor:
    """Return scores [U] in fp64 that depend on the seed, the layer and the kind of unit only."""
    return torch.rand(group.num_units, dtype=torch.float64, generator=generator(seed, "loram", layer, group.name))


def magnitude_scores(group: Group, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return squared Frobenius norms [U] in fp64 of everything that belongs to each unit.

    Args:
        weights: member path -> weight [O, I] of any floating dtype.
    """
    return _summed(group, weights, lambda module, rows, chunk_RI: chunk_RI.square_())


def taylor_scores(
    group: Group, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """First-order estimates [U] in fp64 of the loss change when a unit goes, weight by weight.

    Args:
        weights: member path -> weight [O, I].
        gradients: member path -> gradient [O, I] of the loss over the whole calibration set.
    """
    return _summed(group, weights, lambda module, rows, chunk_RI: chunk_RI.mul_(gradients[module][rows]).abs_())


def wanda_scores(
    group: Group, weights: Mapping[str, torch.Tensor], square_sums: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return weights times input norms, summed: [U] in fp64.

    Args:
        weights: member path -> weight [O, I].
        square_sums: member path -> sums [I] in fp64 of the squares of every input over all tokens.
    """
    norms = {module: sums_I.sqrt().float() for module, sums_I in square_sums.items()}
    return _summed(group, weights, lambda module, rows, chunk_RI: chunk_RI.abs_().mul_(norms[module]))


def best(scores_U: torch.Tensor, num_kept: int) -> list[int]:
    """Return the ``num_kept`` units of highest score, ascending; of equal ones the first."""
    order = torch.sort(scores_U, descending=True, stable=True).indices
    return sorted(order[:num_kept].tolist())


def _summed(
    group: Group,
    weights: Mapping[str, torch.Tensor],
    value_: Callable[[str, slice, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sum [U] in fp64 over all members; ``value_`` turns a chunk [R, I] of weights into what is summed, in place."""
    total_U = torch.zeros(group.num_units, dtype=torch.float64)
    for member in group.members:
        sums = _side_sums(weights[member.module], member, value_)
        total_U += member.per_unit(sums, group.num_units)
    return total_U


def _side_sums(
    weight_OI: torch.Tensor, member: Member, value_: Callable[[str, slice, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Sum per output [O] or per input [I] of one weight: fp32 in a chunk, fp64 between chunks."""
    outputs, inputs = weight_OI.shape
    sums = torch.zeros(outputs if member.side == "out" else inputs, dtype=torch.float64)
    step = max(1, _CHUNK_ELEMENTS // inputs)
    buffer_RI = torch.empty(step, inputs)
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        chunk_RI = value_(member.module, rows, buffer_RI[: rows.stop - start].copy_(weight_OI[rows]))
        if member.side == "out":
            sums[rows] = chunk_RI.sum(1).double()
        else:
            sums += chunk_RI.sum(0)
    return sums

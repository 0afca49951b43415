"""Options of 8-bit AdamW, as the recipe reads them, and which tensors it holds in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from raymem.kinds import OPTIONS_RULES

BLOCK = 256
"""Numbers that share a scale."""
SMALLEST = 4096
"""Numbers of a tensor from which on its moments are held in 8 bits (bitsandbytes' own limit)."""
SMALLEST_PAGED = 100_000
"""Numbers from which on a moment lies in paged memory (bitsandbytes' own limit)."""
_Beta = Annotated[float, Ge(0.0), Lt(1.0)]


@dataclass(frozen=True)
class AdamW8bitOptions:
    """AdamW with moments in 8 bits (Dettmers et al. 2022), by bitsandbytes (``pip install raymem[quant]``)."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["adamw_8bit"] = "adamw_8bit"
    lr: Annotated[float, Gt(0)] = 2e-4
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.0
    paged: bool = False
    """Moments lie in memory that CUDA moves between GPU and host: they take of the GPU what is free there."""


def is_compressed(shape: Sequence[int], *, sharded: bool) -> bool:
    """Say whether the moments of a tensor are held in 8 bits.

    Blocks run over the tensor row after row. One that is sharded by rows must consist of whole blocks in each row, or
    its scales would depend on the number of workers.
    """
    numel = math.prod(shape)
    return numel >= SMALLEST and (not sharded or rows_are_blocks(shape))


def rows_are_blocks(shape: Sequence[int]) -> bool:
    """Say whether each row of a tensor (an index of its first dimension) is made of whole blocks."""
    return math.prod(shape[1:]) % BLOCK == 0


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor: [rows, blocks of a row] if rows are whole blocks, else [blocks]."""
    if rows_are_blocks(shape):
        return (shape[0], math.prod(shape[1:]) // BLOCK)
    return (-(-math.prod(shape) // BLOCK),)

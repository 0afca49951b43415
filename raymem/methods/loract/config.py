"""Options of LoRAct, as the recipe and :func:`compress_activations` read them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from raymem.kinds import OPTIONS_RULES

Scope = Literal["layer", "sublayer", "linear"]
FirstInput = Literal["raw", "compressed"]


@dataclass(frozen=True)
class LoRActOptions:
    """Activations are kept for backward as low-rank factors, made while the forward pass runs (LoRAct).

    Raises:
        ValueError: a value out of range; the message starts with the field's name.
    """

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["loract"] = "loract"
    rank: int | float | Literal["auto"] = 0.125
    """Rank of the factors: a number of columns, a fraction of the hidden size, or ``auto`` for one per site, chosen
    before the first step."""
    scope: Scope = "layer"
    """``layer``: gradient checkpointing with compressed layer inputs. ``sublayer``: compressed norm outputs, attention
    and MLP checkpointed from them; more exact, a little larger, with a lower peak. ``linear``: nothing is recomputed
    but what norms, gates and linear layers keep; fastest and largest."""
    layers: str | None = None
    """Regular expression for the whole names of the layers; by default they are known by their type."""
    first_input: FirstInput = "raw"
    """Whether the input of the first layer of a stack is compressed too: it has one row per token of the vocabulary
    that occurs, which no low rank holds."""
    power_iterations: int = 1
    """Iterations of the range finder: each brings the factors closer to the best of their rank, for two products."""
    tolerance: float = 0.1
    """With ``rank: auto``: relative error (Frobenius norm) that the factors of a site may have."""
    max_rank: int | float = 0.25
    """With ``rank: auto``: the highest rank that is chosen; a number of columns or a fraction of the hidden size."""
    report_every: int = 0
    """Steps between measurements of the relative error of every site; 0 measures none."""
    side_stream: bool = False
    """Compress on a CUDA stream of its own, beside the forward pass."""

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope: {self.scope!r} is not one of {', '.join(get_args(Scope))}")
        if self.first_input not in get_args(FirstInput):
            raise ValueError(f"first_input: {self.first_input!r} is not one of {', '.join(get_args(FirstInput))}")
        if self.rank != "auto":
            _check_rank("rank", self.rank)
        _check_rank("max_rank", self.max_rank)
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance: {self.tolerance!r} must lie between 0 and 1")
        for name in ("power_iterations", "report_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)!r} must not be negative")
        if self.layers is not None:
            try:
                re.compile(self.layers)
            except re.error as error:
                raise ValueError(f"layers: {self.layers!r} is not a regular expression: {error}") from None


def _check_rank(name: str, rank: int | float | str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise ValueError(f"{name}: {rank!r} must be a whole number, a fraction of the hidden size, or auto")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"{name}: {rank!r} must be at least 1")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"{name}: {rank!r} must lie above 0 and be at most 1, a fraction of the hidden size")

"""Options of MoRAM, free of torch and peft so that a recipe can be checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from raymem.kinds import OPTIONS_RULES

Criterion = Literal["gradient", "absolute_gradient", "magnitude", "random"]
"""How connections are ranked. ``gradient``: |sum of gradients over the batches|; ``absolute_gradient``: sum of the
batches' |gradient|; ``magnitude``: |weight|; ``random``: a seeded draw. The last two need no data."""

Formulation = Literal["auto", "fast", "frugal"]
"""How the sampled gradient is computed; see ops.py. ``auto`` decides by density, dtype and device."""

DEFAULT_DENSITY = 0.03


def check_sizes(rank: int, k: int | None, density: float | None, alpha: float, *, rank_name: str = "rank") -> None:
    """Check the rules that a recipe and a PEFT config share.

    Raises:
        ValueError: names the option, its value, the rule and the cure.
    """
    if rank < 1:
        raise ValueError(f"{rank_name}: {rank} is below 1; use a positive rank such as 16")
    if not 0.0 < alpha < float("inf"):
        raise ValueError(f"alpha: {alpha} must be a finite number above 0; twice the rank is a good start")
    if k is not None and density is not None:
        raise ValueError(f"k: {k} and density: {density} say the same thing twice; give one of them")
    if k is not None and k < 1:
        raise ValueError(f"k: {k} is below 1; every output keeps at least one input connection")
    if density is not None and not 0.0 < density <= 1.0:
        raise ValueError(f"density: {density} is outside (0, 1]; it is the share of inputs that every output keeps")


def connections(k: int | None, density: float | None, fan_in: int, layer: str) -> int:
    """Return how many connections every output of a layer with ``fan_in`` inputs keeps (at least one).

    Raises:
        ValueError: ``k`` is more than the layer has inputs; ``where`` names the layer.
    """
    if k is None:
        return max(1, round((DEFAULT_DENSITY if density is None else density) * fan_in))
    if k > fan_in:
        raise ValueError(
            f"k: {k} is more than the {fan_in} inputs of {layer}; use k <= {fan_in}, leave that layer out of the "
            "targets, or give density, which follows the width of each layer"
        )
    return k


@dataclass(frozen=True, kw_only=True)
class MoRAMOptions:
    """MoRAM: a low-rank update of gradient-selected connections (IJCAS 23(11), 2025).

    Raises:
        ValueError: a value out of range; the message starts with the field's name.
    """

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["moram"] = "moram"
    rank: int = 16
    """Rank of the factors; with their optimizer state they are all that is trained."""
    k: int | None = None
    """Input connections that every output neuron keeps; instead of ``density``."""
    density: float | None = None
    """Share of its inputs that every output neuron keeps, in (0, 1]; 0.03 if neither it nor ``k`` is given."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """``all-linear`` (every linear layer that text passes through but the output head; docs/models.md), or names such
    as ``[q_proj, v_proj]``, or regular expressions for whole module names."""
    criterion: Criterion = "gradient"
    """``gradient`` (|sum over the batches|), ``absolute_gradient`` (sum of |gradient|), or without data ``magnitude``
    (of the weight) or ``random``."""
    selection_batches: int = 8
    """Global batches of training data whose gradients choose the connections before the first step."""
    refresh_every: int | None = None
    """Steps after which the connections are chosen anew; null keeps the first choice."""
    init_from: str | None = None
    """PEFT directory whose adapter is continued, with its connections."""
    formulation: Formulation = "auto"
    """``fast`` (dot products at the selected places), ``frugal`` (one more matrix product, by small chunks), or
    ``auto``: by density, dtype and device."""

    def __post_init__(self) -> None:
        check_sizes(self.rank, self.k, self.density, self.alpha)
        if not self.targets:
            raise ValueError("targets: the list is empty; give all-linear or names of linear layers")
        if self.selection_batches < 1:
            raise ValueError(f"selection_batches: {self.selection_batches} is below 1; 8 is a good start")
        if self.refresh_every is not None and self.refresh_every < 1:
            raise ValueError(f"refresh_every: {self.refresh_every} is below 1; leave it out to keep the first choice")
        if self.refresh_every is not None and not self.needs_data:
            raise ValueError(
                f"refresh_every: {self.refresh_every} with criterion: {self.criterion} would choose the same "
                "connections again; leave it out, or use criterion: gradient"
            )

    @property
    def needs_data(self) -> bool:
        """Whether the connections are chosen by gradients."""
        return self.criterion in ("gradient", "absolute_gradient")

"""The options of LoRAM: the very classes that a recipe validates."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, ClassVar, Literal, get_args

from raymem.errors import RecipeError
from raymem.kinds import OPTIONS_RULES

Criterion = Literal["random", "magnitude", "taylor", "wanda", "sparsegpt"]
Structure = Literal["units", "2:4", "4:8", "unstructured"]

CRITERIA: dict[str, tuple[Criterion, ...]] = {
    "units": ("random", "magnitude", "taylor", "wanda"),
    "2:4": ("magnitude", "wanda", "sparsegpt"),
    "4:8": ("magnitude", "wanda", "sparsegpt"),
    "unstructured": ("magnitude", "wanda", "sparsegpt"),
}
"""Structure -> criteria that may choose its weights."""


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """How a model is pruned (LoRAM, arXiv 2502.13533, section 3).

    Raises:
        ValueError: a value out of range, or options that do not go together; the message starts with the field's name.
    """

    __pydantic_config__: ClassVar = OPTIONS_RULES

    structure: Structure = "units"
    """``units`` removes whole KV groups and neurons, which is what saves memory. ``2:4``, ``4:8`` and ``unstructured``
    write zeros into dense weights: research modes that save no memory at all."""
    criterion: Criterion = "random"
    """How units (or weights) are ranked: by chance, size, first-order Taylor, Wanda; SparseGPT for zeros only."""
    ratio: float = 0.5
    """Share of units (or weights) that goes from every pruned layer."""
    keep_first: int = 4
    """Layers at the start that stay whole."""
    keep_last: int = 2
    """Layers at the end that stay whole."""
    layer_ratios: tuple[float, ...] | None = None
    """One ratio for every layer, instead of ``ratio``, ``keep_first`` and ``keep_last``."""
    round_to: int = 1
    """Kept neurons are rounded down to a multiple of this (64 or 128 suit tensor cores)."""
    refit: bool = False
    """Fit the weights that read the kept units (attention output, MLP down projection) to what the whole layer gave, by
    least squares over the calibration texts; the more tokens these have, the better."""
    seed: int = 0
    """Seed of the criterion ``random``."""

    def __post_init__(self) -> None:
        for name, allowed in (("structure", get_args(Structure)), ("criterion", get_args(Criterion))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.criterion not in CRITERIA[self.structure]:
            raise ValueError(
                f"criterion: {self.criterion} cannot choose what goes under structure: {self.structure}; "
                f"choose one of {', '.join(CRITERIA[self.structure])}"
            )
        if self.refit and self.structure != "units":
            raise ValueError(
                f"refit: true contradicts structure: {self.structure}; leave it out (criterion: sparsegpt moves the "
                "weights that stay)"
            )
        for option, ratio in [("ratio", self.ratio), *_named(self.layer_ratios)]:
            if not 0 <= ratio < 1:
                raise ValueError(f"{option}: {ratio} is outside [0, 1); it is the share that is pruned away")
            if ":" in self.structure and ratio not in (0, 0.5):
                raise ValueError(
                    f"{option}: {ratio} contradicts structure: {self.structure}, which removes 0.5; set 0.5"
                )
        for name, least in (("keep_first", 0), ("keep_last", 0), ("round_to", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is too small; it is at least {least}")

    @property
    def ranks_by_data(self) -> bool:
        """Whether the criterion looks at data."""
        return self.criterion in ("taylor", "wanda", "sparsegpt")

    @property
    def needs_calibration(self) -> bool:
        """Whether pruning looks at data."""
        return self.ranks_by_data or self.refit

    def ratio_of(self, layer: int, num_layers: int) -> Fraction:
        """Return the exact ratio of one layer: decimals mean what they say (0.9 is nine tenths, not the nearest float).

        Raises:
            RecipeError: ``layer_ratios`` is for a model of another depth.
        """
        if self.layer_ratios is not None:
            if len(self.layer_ratios) != num_layers:
                raise RecipeError(
                    f"layer_ratios: {len(self.layer_ratios)} values for a model of {num_layers} layers; give one each"
                )
            return Fraction(str(self.layer_ratios[layer]))
        if self.keep_first <= layer < num_layers - self.keep_last:
            return Fraction(str(self.ratio))
        return Fraction(0)


@dataclass(frozen=True, kw_only=True)
class LoRAMOptions(PruneOptions):
    """A pruned model that carries the training of adapters for the full one (LoRAM, arXiv 2502.13533).

    Raises:
        ValueError: a value out of range, or options that do not go together; the message starts with the field's name.
    """

    kind: Literal["loram"] = "loram"
    quantize: Literal["none", "nf4"] = "none"
    """``nf4`` holds the linear layers of the pruned model in 4 bits (QLoRAM)."""
    calibration: str | None = None
    """File, directory or Hugging Face id of the texts that taylor, wanda, sparsegpt and refit look at; by default the
    training data."""
    calibration_texts: int = 10
    """Texts of it that are drawn."""
    calibration_length: int = 64
    """Tokens of each."""
    align: dict[str, Any] | None = None
    """Sections (``data``, ``train``, ``optimizer``, ...) that replace this recipe's while the pruned model itself is
    trained before its adapter, with the output head frozen; null leaves that out."""
    artifact: str | None = None
    """Directory of a model that was pruned before; all that says how to prune is then left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("calibration_texts", 1), ("calibration_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is too small; it is at least {least}")
        if self.artifact is not None:
            free = ("kind", "quantize", "artifact")
            ignored = [f.name for f in fields(self) if f.name not in free and getattr(self, f.name) != f.default]
            if ignored:
                raise ValueError(
                    f"artifact: {self.artifact} is pruned already, so {ignored[0]} would have no effect; leave it out, "
                    "or leave artifact out and prune anew"
                )

    @property
    def pruning(self) -> PruneOptions:
        """The part that decides what is pruned."""
        return PruneOptions(**{field.name: getattr(self, field.name) for field in fields(PruneOptions)})


def _named(ratios: tuple[float, ...] | None) -> list[tuple[str, float]]:
    return [(f"layer_ratios[{index}]", ratio) for index, ratio in enumerate(ratios or ())]

"""Options of MLorc, as the recipe and the optimizers read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from raymem.kinds import OPTIONS_RULES


@dataclass(frozen=True)
class MLorcOptions:
    """Options that both optimizers share.

    Raises:
        ValueError: a value out of range; the message starts with the field's name.
    """

    __pydantic_config__: ClassVar = OPTIONS_RULES

    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the moments."""
    weight_decay: float = 0.0
    """Decoupled: each step takes lr x weight_decay of a weight."""
    rank: int = 4
    """Rank of the compressed moments."""
    oversampling: int = 8
    """Fresh random columns that every sketch adds to the directions of the step before."""
    min_dim: int = 64
    """A matrix is compressed if its shorter side has at least this length; all else keeps whole moments."""
    compress_embeddings: bool = True
    """Whether embedding matrices count like any other; their gradients are nonzero in a few rows only."""
    factor_dtype: Literal["fp32", "bf16"] = "fp32"
    """Storage dtype of the factors; the arithmetic is fp32."""
    step_in_backward: bool = False
    """Update each parameter as soon as backward has its gradient, and free that: one gradient is alive at a time."""

    def __post_init__(self) -> None:
        rules = {
            "lr": (self.lr >= 0, "must not be negative"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "must both lie in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "must not be negative"),
            "rank": (self.rank >= 1, "must be at least 1"),
            "oversampling": (self.oversampling >= 0, "must not be negative"),
            "min_dim": (self.min_dim >= 1, "must be at least 1"),
            "factor_dtype": (self.factor_dtype in ("fp32", "bf16"), "is none of fp32, bf16"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name}: {getattr(self, name)!r} {rule}")


@dataclass(frozen=True)
class MLorcAdamWOptions(MLorcOptions):
    """AdamW with momentum compressed to low rank (MLorc, algorithm 1)."""

    kind: Literal["mlorc_adamw"] = "mlorc_adamw"
    eps: float = 1e-8
    """Added to the root of the second moment."""
    second_moment: Literal["raw", "sqrt"] = "raw"
    """``raw`` compresses the second moment itself, as in the paper; ``sqrt`` compresses its root, which needs no repair
    of negative entries."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps <= 0:
            raise ValueError(f"eps: {self.eps!r} must be positive")
        if self.second_moment not in ("raw", "sqrt"):
            raise ValueError(f"second_moment: {self.second_moment!r} is none of raw, sqrt")


@dataclass(frozen=True)
class MLorcLionOptions(MLorcOptions):
    """Lion with momentum compressed to low rank (MLorc, algorithm 2)."""

    kind: Literal["mlorc_lion"] = "mlorc_lion"
    betas: tuple[float, float] = (0.9, 0.99)
    """Weight of the momentum in the update, and decay of the momentum."""

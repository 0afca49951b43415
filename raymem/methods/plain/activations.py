"""Keeps what backward needs, or computes it again with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.kinds import OPTIONS_RULES, ActivationsKind, Advice


@dataclass(frozen=True)
class KeepAll:
    """Everything that backward needs is kept."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class Checkpointing:
    """Gradient checkpointing by transformers: layers are recomputed in backward."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["checkpoint"] = "checkpoint"


class KeepAllKind(ActivationsKind[KeepAll]):
    """The model as transformers runs it."""

    options = KeepAll


class CheckpointKind(ActivationsKind[Checkpointing]):
    """Only the inputs of layers are kept (Chen et al. 2016)."""

    options = Checkpointing

    def prepare(self, model: Any, options: Checkpointing) -> None:
        model.activation_checkpointing_enable({"use_reentrant": False})

    def rough_bytes(self, options: Checkpointing, *, layers: int, layer_bytes: int, input_bytes: int) -> int:
        return layers * input_bytes + layer_bytes

    def advice(self) -> Sequence[Advice]:
        return [Advice("activations=checkpoint", ("activations",), cost=30, applies=_has_none)]


def _has_none(recipe: Any) -> bool:
    return not isinstance(recipe.activations, Checkpointing)

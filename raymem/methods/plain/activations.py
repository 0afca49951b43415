"""Keeps what backward needs, or computes it again with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.kinds import OPTIONS_RULES, ActivationsKind, Advice
from raymem.methods.layers.checkpointing import checkpoint_layers


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
        checkpoint_layers(model)

    def rough_bytes(self, options: Checkpointing, *, layers: int, layer_bytes: int, input_bytes: int) -> int:
        return layers * input_bytes + layer_bytes

    def advice(self) -> Sequence[Advice]:
        """Name checkpointing, whose cost is the share of one more forward pass: of frozen weights backward multiplies
        once, for the input's gradient, of trained ones twice."""

        def advice(trains_adapter: bool, share: str) -> Advice:
            time = f"about {share} more: the forward pass runs again in backward"
            return Advice(
                "activations=checkpoint", ("activations",), cost=30, exact=True, time=time,
                applies=lambda recipe: _has_none(recipe) and recipe.trains_adapter == trains_adapter,
            )  # fmt: skip

        return [advice(True, "1/2"), advice(False, "1/3")]


def _has_none(recipe: Any) -> bool:
    return not isinstance(recipe.activations, Checkpointing)

"""Makes offloading a kind of the ``activations`` axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.errors import ModelError, RecipeError
from raymem.kinds import OPTIONS_RULES, ActivationsKind, Advice
from raymem.methods.layers.checkpointing import checkpoint_layers


@dataclass(frozen=True)
class OffloadOptions:
    """What layers keep for backward lies in page-locked memory of the host, and is copied beside the computation."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["offload"] = "offload"
    checkpoint: bool = False
    """With gradient checkpointing: of each layer only the input travels."""


class OffloadKind(ActivationsKind[OffloadOptions]):
    """The kind that holds activations on the host."""

    options = OffloadOptions

    def prepare(self, model: Any, options: OffloadOptions) -> None:
        if options.checkpoint:
            checkpoint_layers(model)

    def install(self, model: Any, options: OffloadOptions, seed: int) -> None:
        """Offload the activations of a complete model.

        Raises:
            RecipeError: it has no layers that are known.
        """
        from raymem.methods.offload.install import offload_activations

        try:
            offload_activations(model)
        except ModelError as error:
            raise RecipeError(f"activations.kind: {error}") from None

    def rough_bytes(self, options: OffloadOptions, *, layers: int, layer_bytes: int, input_bytes: int) -> int:
        return layer_bytes + 2 * input_bytes if options.checkpoint else 2 * layer_bytes

    def advice(self) -> Sequence[Advice]:
        time = "as much more as copies to the host and back take longer than the layers that they run beside"
        return [
            Advice(
                "activations=offload", ("activations",), cost=32, exact=True, time=time,
                applies=lambda r: r.scaling.use_gpu and not _is_offload(r),
            ),
            Advice(
                "activations.checkpoint=true", ("activations",), cost=34, exact=True,
                time="about 1/2 more on frozen weights, 1/3 on trained ones: the forward pass runs again in backward",
                applies=lambda r: _is_offload(r) and not r.activations.checkpoint,
            ),
        ]  # fmt: skip


def _is_offload(recipe: Any) -> bool:
    return isinstance(recipe.activations, OffloadOptions)

"""Takes the model as it is, in its own precision or in 4 bits, on the device or on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.errors import ModelError, RecipeError
from raymem.kinds import OPTIONS_RULES, Advice, BaseKind, Rule


@dataclass(frozen=True)
class FullBase:
    """The model as it is."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["full"] = "full"
    quantize: Literal["none", "nf4"] = "none"
    """``nf4`` stores frozen linear layers and experts in 4 bits (bitsandbytes, ``pip install raymem[quant]``)."""
    offload: bool = False
    """Frozen layers live in page-locked memory of the host; each is copied to the device while the layer before it (in
    backward: behind it) runs."""


class FullBaseKind(BaseKind[FullBase]):
    """The kind with every weight of the model that the recipe names."""

    options = FullBase
    exact = ("offload",)

    def prepare(self, model: Any, options: FullBase) -> None:
        if not options.offload:
            return
        from raymem.methods.streaming.stream import stream_layers

        try:
            stream_layers(model)
        except ModelError as error:
            raise RecipeError(f"base.{error}") from None

    def is_streamed(self, options: FullBase) -> bool:
        return options.offload

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(
                ("base.offload: true", "adapter: none"),
                "layers that are trained must stay on the device",
                "use adapter: lora, or leave base.offload out",
                lambda r: _is_streamed(r) and not r.trains_adapter,
            ),
            Rule(
                ("base.offload: true", "base.quantize: nf4"),
                "bitsandbytes keeps scales beside a weight on the device, and this is not tested",
                "use one of the two",
                lambda r: _is_streamed(r) and r.base.quantize == "nf4",
            ),
            Rule(
                ("base.offload: true", "scaling.strategy: fsdp2"),
                "shards are gathered from devices",
                "use scaling.strategy: ddp, or leave base.offload out",
                lambda r: _is_streamed(r) and r.scaling.strategy == "fsdp2",
            ),
        ]

    def advice(self) -> Sequence[Advice]:
        time = "much more unless each layer computes longer than its copy takes; many rows per pass help"
        return [
            Advice(
                "base.offload=true", ("weights",), cost=60, exact=True, time=time,
                applies=lambda r: r.scaling.use_gpu and isinstance(r.base, FullBase) and not r.base.offload,
            ),
        ]  # fmt: skip


def _is_streamed(recipe: Any) -> bool:
    return isinstance(recipe.base, FullBase) and recipe.base.offload

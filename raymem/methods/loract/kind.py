"""Makes LoRAct a kind of the ``activations`` axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raymem.errors import ModelError, RecipeError
from raymem.hooks import Hook
from raymem.kinds import ActivationsKind, Advice, Rule, Start
from raymem.methods.loract.config import LoRActOptions


class LoRActKind(ActivationsKind[LoRActOptions]):
    """Activations are kept for backward as low-rank factors."""

    options = LoRActOptions
    grows = ("rank",)
    start = Start(
        "loract",
        "LoRA with LoRAct",
        {
            "activations.kind": ("loract", "what backward needs is kept in low-rank factors"),
            "activations.rank": (0.125, "of the factors, as a share of the hidden size"),
            "adapter.kind": ("lora", "two small trained matrices beside every linear layer"),
            "adapter.rank": (16, "8 to 64: more can learn more, and takes more memory"),
            "optimizer.kind": ("adamw", ""),
            "optimizer.lr": (2.0e-4, "usual for LoRA: 1.0e-4 to 2.0e-4"),
        },
    )

    def install(self, model: Any, options: LoRActOptions, seed: int) -> None:
        """Compress a complete model (wrapped, sharded, loaded or on meta).

        Raises:
            RecipeError: options that do not fit the model.
        """
        from raymem.methods.loract.compression import compress_activations

        try:
            compress_activations(model, options, seed=seed)
        except ModelError as error:
            raise RecipeError(f"activations.{error}") from None

    def keeps_stock_layers(self, options: LoRActOptions) -> bool:
        return options.scope == "linear"

    def hooks(self, options: LoRActOptions, model: Any, seed: int) -> Sequence[Hook]:
        from raymem.methods.loract.hook import LoRActHook

        return [LoRActHook(model)]

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(
                ("activations.side_stream: true", "scaling.use_gpu: false"),
                "streams run side by side on GPUs only",
                "set scaling.use_gpu: true, or leave activations.side_stream out",
                lambda r: (
                    isinstance(r.activations, LoRActOptions) and r.activations.side_stream and not r.scaling.use_gpu
                ),
            )
        ]

    def advice(self) -> Sequence[Advice]:
        time = "about that of checkpointing: each layer's forward pass runs again, and its input is compressed"
        return [Advice("activations=loract", ("activations",), cost=40, applies=_has_none, time=time)]


def _has_none(recipe: Any) -> bool:
    return not isinstance(recipe.activations, LoRActOptions)

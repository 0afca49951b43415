"""Makes LoRAM a kind of the ``base`` axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from raymem.errors import ModelError
from raymem.kinds import Advice, BaseKind, Rule, Start
from raymem.methods.loram.config import LoRAMOptions


class LoRAMKind(BaseKind[LoRAMOptions]):
    """A pruned copy of the model, which stands in for it while an adapter is trained."""

    options = LoRAMOptions
    command = "loram run"
    paths = ("artifact",)
    paths_or_ids = ("calibration",)

    replaces_model = True
    start = Start(
        "loram",
        "LoRA on a pruned model (LoRAM)",
        {
            "base.kind": ("loram", "the adapter is trained on a pruned model, then recovered for the full one"),
            "base.ratio": (0.5, "share of KV groups and neurons that is pruned"),
            "base.criterion": ("wanda", "ranks them by their weights and activations on a few training texts"),
            "base.refit": (True, "what reads those that stay is fitted to what the whole layer gave"),
            "adapter.kind": ("lora", "two small trained matrices beside every linear layer"),
            "adapter.rank": (16, "8 to 64: more can learn more, and takes more memory"),
            "optimizer.kind": ("adamw", ""),
            "optimizer.lr": (1.0e-4, "usual for LoRA: 1.0e-4 to 2.0e-4"),
        },
    )

    def directory(self, options: LoRAMOptions) -> str:
        """Return the pruned model."""
        if options.artifact is None:
            raise ModelError(
                "base.kind: loram: the model is not pruned yet; run `raymem loram prune` with this recipe, or give the "
                "directory of a pruned model as base.artifact"
            )
        return options.artifact

    def is_planned(self, options: LoRAMOptions) -> bool:
        return options.artifact is None

    def located(self, options: LoRAMOptions, directory: str) -> LoRAMOptions:
        return LoRAMOptions(artifact=directory, quantize=options.quantize)

    def described(self, options: LoRAMOptions, result: Path) -> dict[str, Any]:
        from raymem.methods.loram.manifest import MANIFEST, read_manifest

        own = super().described(options, result)
        if not (result / MANIFEST).is_file():
            return own
        # Options that name a pruned model say nothing of how it was made; the manifest does.
        made = dict(read_manifest(result, with_weights=False).options)
        return {"kind": own["kind"], **made, "quantize": options.quantize}

    def planned_config(self, options: LoRAMOptions, config: Any) -> Any:
        """Return the config with the widths that pruning will leave of every layer.

        Raises:
            RecipeError: options that leave nothing of a layer.
        """
        from raymem.methods.loram.nonuniform import with_counts
        from raymem.methods.loram.pruning.plan import plan_pruning

        return with_counts(config, plan_pruning(config, options.pruning).counts)

    def building(self, config: Any) -> AbstractContextManager[None]:
        from raymem.methods.loram.nonuniform import pruned_layers

        return pruned_layers(config)

    def alignment(self, options: LoRAMOptions) -> Mapping[str, Any] | None:
        return options.align

    def with_alignment(self, options: LoRAMOptions, sections: Mapping[str, Any]) -> LoRAMOptions:
        return replace(options, align=dict(sections))

    def is_of_model(self, directory: str) -> bool:
        from raymem.methods.loram.recover import is_recovered

        return is_recovered(directory)

    def why_not_of_model(self, directory: Path) -> str | None:
        from raymem.methods.loram.manifest import MANIFEST

        if not (directory / MANIFEST).is_file() or self.is_of_model(str(directory)):
            return None
        return "it is of a pruned model; recover it first: raymem loram recover RECIPE"

    def stamp(self, result: Path, weights: Path) -> None:
        """Record which weights of the full model the adapter was trained on, so that it can be recovered."""
        from raymem.methods.loram.recover import stamp_adapter

        stamp_adapter(result, weights)

    def rules(self) -> Sequence[Rule]:
        return (
            Rule(
                ("base.kind: loram", "adapter: none"),
                "only an adapter can be recovered for the full model",
                "use adapter: lora or moram; the pruned model itself is trained by base.align",
                lambda r: _is_loram(r) and not r.trains_adapter,
            ),
            Rule(
                ("base.kind: loram", "model.config"),
                "random weights are not worth pruning",
                "give model.name",
                lambda r: _is_loram(r) and r.model.config is not None,
            ),
            Rule(
                ("base.kind: loram", "export.push_to_hub"),
                "the trained adapter fits the pruned model only; the result is the one that is recovered from it",
                "leave export out, and push that one when it is verified: raymem push <run>/recovered OWNER/NAME",
                lambda r: _is_loram(r) and r.export.push_to_hub is not None,
            ),
        )

    def advice(self) -> Sequence[Advice]:
        """Name LoRAM where weights are the largest term; pruning is a pipeline of its own, so it is not worked out."""
        time = "less per step; pruning and aligning the base come first"
        return [
            Advice(
                "base.kind=loram", ("weights",), cost=95, time=time, is_planned=False,
                applies=lambda recipe: recipe.trains_adapter and not _is_loram(recipe),
            )
        ]  # fmt: skip


def _is_loram(recipe: Any) -> bool:
    return isinstance(recipe.base, LoRAMOptions)

"""Makes MoRAM a kind of the ``adapter`` axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raymem.errors import RecipeError
from raymem.hooks import Hook
from raymem.kinds import Start
from raymem.methods.moram.config import MoRAMOptions, connections
from raymem.methods.peft.kind import PeftAdapterKind, linear_shape, tuned_layers

if TYPE_CHECKING:
    from raymem.methods.peft.targets import Targets

_IDENTITY_BYTES = 8 * 3
"""The fingerprint of a layer's base weight: three int64."""


class MoRAMKind(PeftAdapterKind[MoRAMOptions]):
    """A low-rank update of gradient-selected connections.

    Density is not among ``grows``: layers change their formulation with it.
    """

    options = MoRAMOptions
    usage = f"import raymem.methods.moram  # teaches PEFT the method\n{PeftAdapterKind.usage}"
    peft_type = "MORAM"
    free = ("alpha", "selection_batches")
    meaning = {"r": "rank", "k": "k", "density": "density", "alpha": "alpha"}
    factors = ("moram_A", "moram_B")
    start = Start(
        "moram",
        "MoRAM",
        {
            "adapter.kind": ("moram", "a low-rank update of the connections that gradients choose"),
            "adapter.rank": (16, "of the factors that are trained"),
            "adapter.density": (0.03, "share of its inputs that each neuron keeps"),
            "optimizer.kind": ("adamw", ""),
            "optimizer.lr": (5.0e-4, "2 to 3 times what LoRA takes (its README has a comparison)"),
        },
    )

    def peft_config(self, options: MoRAMOptions, targets: Targets) -> Any:
        try:
            from raymem.methods.moram import MoRAMConfig
        except ImportError as error:
            raise RecipeError(f"adapter.kind: {error}") from None

        if targets.parameters:
            raise RecipeError(
                f"adapter.targets: {targets.parameters[0]} holds routed experts, and MoRAM adapts linear layers; leave "
                "it out or use adapter: lora"
            )
        return MoRAMConfig(
            r=options.rank,
            k=options.k,
            density=options.density,
            alpha=options.alpha,
            formulation=options.formulation,
            target_modules=targets.modules,
            task_type="CAUSAL_LM",
        )

    def initial_value(self, name: str, shape: Sequence[int], seed: int) -> Any:
        """Start factors as PEFT does; connections are not chosen yet."""
        import torch

        if ".moram_index." in name:
            return torch.full(tuple(shape), -1, dtype=torch.int32)
        if ".moram_base." in name:
            return torch.zeros(*shape, dtype=torch.int64)
        return super().initial_value(name, shape, seed)

    def register(self) -> None:
        from raymem.methods import moram

        moram.register()

    def continuing(self, config: Mapping[str, Any], directory: str) -> MoRAMOptions:
        return MoRAMOptions(
            rank=config["r"],
            k=config["k"],
            density=config["density"],
            alpha=float(config["alpha"]),
            targets=config["target_modules"],
            init_from=directory,
        )

    def state(self, model: Any, saved: dict[str, Any]) -> dict[str, Any]:
        from raymem.methods.moram import model_state

        return model_state(model, saved)

    def loaded(self, model: Any, options: MoRAMOptions, seed: int) -> None:
        """Take up the connections of a continued adapter, or choose by the weights or at random. Collective.

        Choices by gradients come with the first step.
        """
        from raymem.methods.moram import mark_selected, select_indices

        if options.init_from is not None:
            mark_selected(model)
        elif not options.needs_data:
            select_indices(model, criterion=options.criterion, seed=seed)

    def check_base(self, model: Any) -> None:
        from raymem.methods.moram import check_base

        check_base(model)

    def hooks(self, options: MoRAMOptions, model: Any, seed: int) -> Sequence[Hook]:
        from raymem.methods.moram.hook import MoRAMHook

        return [MoRAMHook(options, seed)]

    def trained_shapes(self, model: Any, options: MoRAMOptions) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layer in tuned_layers(model):
            outputs, inputs = linear_shape(layer.get_base_layer())
            shapes |= {f"{name}.A": (options.rank, inputs), f"{name}.B": (outputs, options.rank)}
        return shapes

    def buffer_bytes(self, model: Any, options: MoRAMOptions) -> int:
        """Count the bytes of int32 indices and of the base's fingerprints."""
        total = 0
        for name, layer in tuned_layers(model):
            outputs, inputs = linear_shape(layer.get_base_layer())
            total += 4 * outputs * connections(options.k, options.density, inputs, name) + _IDENTITY_BYTES
        return total

    def owns_buffer(self, name: str) -> bool:
        return ".moram_" in name

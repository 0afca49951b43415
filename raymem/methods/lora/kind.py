"""Makes LoRA through PEFT a kind of the ``adapter`` axis (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt, MinLen

from raymem.kinds import OPTIONS_RULES, Advice, Start
from raymem.methods.peft.kind import PeftAdapterKind, linear_shape, tuned_layers

if TYPE_CHECKING:
    from raymem.methods.peft.targets import Targets


@dataclass(frozen=True)
class LoraOptions:
    """LoRA through PEFT (Hu et al. 2021)."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[float, Gt(0)] = 32.0
    dropout: Annotated[float, Ge(0.0), Lt(1.0)] = 0.0
    targets: str | Annotated[list[str], MinLen(1)] = "all-linear"
    """``all-linear`` (every linear layer that text passes through but the output head; docs/models.md), or names such
    as ``[q_proj, v_proj]``, or regular expressions for whole module names."""
    init_from: str | None = None
    """PEFT directory whose adapter is continued."""


class LoraKind(PeftAdapterKind[LoraOptions]):
    """Two trained factors beside every chosen layer."""

    options = LoraOptions
    reads_base = False
    peft_type = "LORA"
    meaning = {
        "r": "rank",
        "lora_alpha": "alpha",
        "use_rslora": None,
        "use_dora": None,
        "rank_pattern": None,
        "alpha_pattern": None,
        "bias": None,
    }
    factors = ("lora_A", "lora_B")
    start = Start(
        "lora",
        "LoRA",
        {
            "adapter.kind": ("lora", "two small trained matrices beside every linear layer"),
            "adapter.rank": (16, "8 to 64: more can learn more, and takes more memory"),
            "adapter.alpha": (32.0, "usually twice the rank"),
            "optimizer.kind": ("adamw", ""),
            "optimizer.lr": (2.0e-4, "usual for LoRA: 1.0e-4 to 2.0e-4"),
        },
    )

    def peft_config(self, options: LoraOptions, targets: Targets) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=targets.modules,
            target_parameters=targets.parameters or None,
            task_type="CAUSAL_LM",
        )

    def initial_value(self, name: str, shape: Sequence[int], seed: int) -> Any:
        """Fill the factors as PEFT does: where an embedding is adapted A is zero and B normal."""
        import torch

        from raymem.seeds import generator

        if ".lora_embedding_A." in name:
            return torch.zeros(*shape)
        if ".lora_embedding_B." in name:
            return torch.empty(*shape).normal_(generator=generator(seed, "adapter", name))
        return super().initial_value(name, shape, seed)

    def continuing(self, config: Mapping[str, Any], directory: str) -> LoraOptions:
        return LoraOptions(
            rank=config["r"], alpha=float(config["lora_alpha"]), targets=config["target_modules"], init_from=directory
        )

    def trained_shapes(self, model: Any, options: LoraOptions) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layer in tuned_layers(model):
            if (experts := _experts_shapes(layer)) is not None:
                shapes |= {f"{name}.{factor}": shape for factor, shape in zip("AB", experts, strict=True)}
                continue
            outputs, inputs = linear_shape(layer.get_base_layer())
            shapes |= {f"{name}.A": (options.rank, inputs), f"{name}.B": (outputs, options.rank)}
        return shapes

    def advice(self) -> Sequence[Advice]:
        terms = ("trainable", "gradients", "optimizer")
        time = "less: frozen weights need no gradients and no update"
        return [Advice("adapter=lora", terms, cost=70, applies=lambda recipe: not recipe.trains_adapter, time=time)]


def _experts_shapes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return A and B of weights that several experts share; PEFT has rules of its own for their ranks, which are taken
    as they come out. None for other layers.
    """
    from peft.tuners.lora.layer import ParamWrapper

    if not isinstance(layer, ParamWrapper):
        return None
    (factor_A,), (factor_B,) = layer.lora_A.values(), layer.lora_B.values()
    return tuple(factor_A.weight.shape), tuple(factor_B.weight.shape)

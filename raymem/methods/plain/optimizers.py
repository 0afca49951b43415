"""AdamW: torch's own, or for bf16 weights without masters with stochastic rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from raymem.kinds import OPTIONS_RULES, Advice, OptimizerContext, OptimizerKind, TensorShape

COUNTER_BYTES = 4
"""Bytes of the step count of a tensor, fp32."""
_Beta = Annotated[float, Ge(0.0), Lt(1.0)]


@dataclass(frozen=True)
class AdamW:
    """``torch.optim.AdamW`` (Loshchilov and Hutter 2017)."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Gt(0)] = 2e-4
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.0
    implementation: Literal["fused", "foreach"] = "fused"
    """``fused`` needs no temporaries; ``foreach`` holds one copy of the trainable weights while it steps."""


class AdamWKind(OptimizerKind[AdamW]):
    """The kind of AdamW with two whole moments per tensor."""

    options = AdamW
    free = ("lr", "betas", "eps", "weight_decay")
    rounds = True

    def build(self, parameters: Mapping[str, Any], options: AdamW, context: OptimizerContext) -> Any:
        import torch

        from raymem.methods.plain.stochastic_adamw import StochasticRoundingAdamW

        arguments: dict[str, Any] = {
            "lr": options.lr,
            "betas": options.betas,
            "eps": options.eps,
            "weight_decay": options.weight_decay,
        }
        if context.stochastic_rounding:
            return StochasticRoundingAdamW(parameters, seed=context.seed, **arguments)
        # torch picks by device when neither is given; the planner must know.
        arguments[options.implementation] = True
        return torch.optim.AdamW(parameters.values(), **arguments)

    def state_bytes(self, options: AdamW, tensor: TensorShape) -> int:
        width = 4 if tensor.rounded else tensor.itemsize
        return 2 * math.prod(tensor.local) * width + COUNTER_BYTES

    def advice(self) -> Sequence[Advice]:
        time = "less: one kernel updates a tensor"
        fused = "optimizer.implementation=fused"
        return [Advice(fused, ("workspace",), cost=10, applies=_has_temporaries, exact=True, time=time)]


def _has_temporaries(recipe: Any) -> bool:
    return isinstance(recipe.optimizer, AdamW) and recipe.optimizer.implementation != "fused"

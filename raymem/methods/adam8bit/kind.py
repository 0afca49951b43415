"""Makes 8-bit AdamW a kind of the ``optimizer`` axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raymem.errors import RecipeError
from raymem.kinds import Advice, OptimizerContext, OptimizerKind, Rule, TensorShape
from raymem.methods.adam8bit.config import SMALLEST_PAGED, AdamW8bitOptions, is_compressed, scales_shape


class AdamW8bitKind(OptimizerKind[AdamW8bitOptions]):
    """The kind of AdamW with two moments in 8 bits."""

    options = AdamW8bitOptions
    free = ("lr", "betas", "eps", "weight_decay")

    def build(self, parameters: Mapping[str, Any], options: AdamW8bitOptions, context: OptimizerContext) -> Any:
        from raymem.methods.adam8bit.optimizer import AdamW8bit

        assert not context.stochastic_rounding, "recipe/compat.py refuses it"
        try:
            return AdamW8bit(
                parameters.values(),
                lr=options.lr,
                betas=options.betas,
                eps=options.eps,
                weight_decay=options.weight_decay,
                paged=options.paged,
            )
        except ImportError:
            raise RecipeError(
                "optimizer.kind: adamw_8bit needs bitsandbytes: pip install 'raymem[quant]', or use optimizer: adamw"
            ) from None

    def state_bytes(self, options: AdamW8bitOptions, tensor: TensorShape) -> int:
        numel = math.prod(tensor.local)
        if not is_compressed(tensor.shape, sharded=tensor.sharded):
            return 2 * 4 * numel
        return 2 * (numel + 4 * _num_scales(tensor))

    def host_state_bytes(self, options: AdamW8bitOptions, tensor: TensorShape) -> int:
        numel = math.prod(tensor.local)
        if not options.paged or numel < SMALLEST_PAGED:
            return 0
        return 2 * numel * (1 if is_compressed(tensor.shape, sharded=tensor.sharded) else 4)

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(
                ("optimizer.paged: true", "scaling.use_gpu: false"),
                "pages move between the memory of a GPU and that of its host",
                "set scaling.use_gpu: true, or leave optimizer.paged out",
                lambda r: _is_paged(r) and not r.scaling.use_gpu,
            ),
            Rule(
                ("optimizer.paged: true", "scaling.strategy: fsdp2"),
                "a distributed tensor lies on its own device, not in pages",
                "use scaling.strategy: ddp, or leave optimizer.paged out: shards are smaller",
                lambda r: _is_paged(r) and r.scaling.strategy == "fsdp2",
            ),
        ]

    def advice(self) -> Sequence[Advice]:
        time = "about the same on GPUs, more on CPUs: moments are expanded and packed again in every update"
        paged = "more where the GPU is full: moments then cross the bus in every update"
        return [
            Advice("optimizer=adamw_8bit", ("optimizer",), cost=35, applies=lambda r: not _is_8bit(r), time=time),
            Advice(
                "optimizer.paged=true", ("optimizer",), cost=40, exact=True, time=paged,
                applies=lambda r: _is_8bit(r) and not r.optimizer.paged,
            ),
        ]  # fmt: skip


def _num_scales(tensor: TensorShape) -> int:
    shape = scales_shape(tensor.shape)
    return tensor.local[0] * shape[1] if len(shape) == 2 else shape[0]


def _is_8bit(recipe: Any) -> bool:
    return isinstance(recipe.optimizer, AdamW8bitOptions)


def _is_paged(recipe: Any) -> bool:
    return _is_8bit(recipe) and recipe.optimizer.paged

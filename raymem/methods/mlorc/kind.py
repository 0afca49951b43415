"""Makes MLorc's optimizers kinds of the ``optimizer`` axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from raymem.errors import RecipeError
from raymem.kinds import Advice, OptimizerContext, OptimizerKind, Rule, Start, TensorShape
from raymem.methods.mlorc.config import MLorcAdamWOptions, MLorcLionOptions, MLorcOptions

OptionsT = TypeVar("OptionsT", bound=MLorcOptions)

_COUNTER_BYTES = 4


class _MLorcKind(OptimizerKind[OptionsT]):
    optimizer: ClassVar[str]
    """Name of the class in :mod:`raymem.methods.mlorc.optimizer`."""
    moments: ClassVar[int]
    free: ClassVar[tuple[str, ...]] = ("lr", "betas", "weight_decay")
    grows = ("rank",)
    rounds = True

    def build(self, parameters: Mapping[str, Any], options: OptionsT, context: OptimizerContext) -> Any:
        from raymem.methods.mlorc import optimizer as optimizers

        arguments = dataclasses.asdict(options)
        in_backward = arguments.pop("step_in_backward")
        whole: frozenset[str] = frozenset() if arguments.pop("compress_embeddings") else context.embeddings
        for name, parameter in parameters.items():
            shorter = min(parameter.shape) if parameter.ndim == 2 and name not in whole else 0
            if options.min_dim <= shorter <= options.rank:
                raise RecipeError(
                    f"optimizer.rank: {options.rank} is not below min(m, n) = {shorter} of {name} "
                    f"{list(parameter.shape)}, so nothing would be saved there; lower it, or set optimizer.min_dim "
                    f"above {shorter} to leave such matrices uncompressed"
                )
        groups: list[dict[str, Any]] = [
            {"params": [(name, p) for name, p in parameters.items() if name not in whole]},
            {"params": [(name, p) for name, p in parameters.items() if name in whole], "rank": None},
        ]
        # The loop's guard checks gradients for NaN before they come here; only stepping in backward is ahead of it.
        del arguments["kind"]
        optimizer = getattr(optimizers, self.optimizer)(
            [group for group in groups if group["params"]],
            **arguments,
            seed=context.seed,
            stochastic_rounding=context.stochastic_rounding,
            check_finite=in_backward,
        )
        if in_backward:
            optimizer.step_in_backward()
        return optimizer

    def state_bytes(self, options: OptionsT, tensor: TensorShape) -> int:
        compressed = (
            len(tensor.shape) == 2
            and min(tensor.shape) >= options.min_dim
            and (options.compress_embeddings or not tensor.embedding)
        )
        if not compressed:
            return self.moments * math.prod(tensor.local) * 4 + _COUNTER_BYTES
        width = 4 if options.factor_dtype == "fp32" else 2
        # Rows of the left factor lie with the rows of the weight, the right one is whole everywhere.
        return self.moments * options.rank * (tensor.local[0] + tensor.shape[1]) * width + _COUNTER_BYTES

    def frees_gradients(self, options: OptionsT) -> bool:
        return options.step_in_backward

    def rules(self) -> Sequence[Rule]:
        return RULES


class MLorcAdamWKind(_MLorcKind[MLorcAdamWOptions]):
    """The kind of AdamW with both moments in factors."""

    options = MLorcAdamWOptions
    optimizer = "MLorcAdamW"
    moments = 2
    start = Start(
        "mlorc",
        "full fine-tuning with MLorc",
        {
            "adapter.kind": ("none", "every weight is trained"),
            "optimizer.kind": ("mlorc_adamw", "AdamW with both moments compressed to a low rank"),
            "optimizer.rank": (4, "of the compressed moments"),
            "optimizer.lr": (2.0e-5, "as AdamW in full fine-tuning: 1.0e-5 to 5.0e-5"),
        },
    )
    free = (*_MLorcKind.free, "eps")

    def advice(self) -> Sequence[Advice]:
        time = "more: each update takes several times that of AdamW, whatever the number of rows"
        terms = ("optimizer",)
        return [Advice("optimizer=mlorc_adamw", terms, cost=45, applies=lambda r: not _is_mlorc(r), time=time)]


class MLorcLionKind(_MLorcKind[MLorcLionOptions]):
    """The kind of Lion with its momentum in factors."""

    options = MLorcLionOptions
    optimizer = "MLorcLion"
    moments = 1


def _is_mlorc(recipe: Any) -> bool:
    return isinstance(recipe.optimizer, MLorcOptions)


def _in_backward(recipe: Any) -> bool:
    return _is_mlorc(recipe) and recipe.optimizer.step_in_backward


RULES = (
    Rule(
        ("optimizer: mlorc_adamw or mlorc_lion", "an adapter"),
        "the factors of an adapter are already of low rank, so there is nothing to compress",
        "use adapter: none, or optimizer: adamw",
        lambda r: _is_mlorc(r) and r.trains_adapter,
    ),
    Rule(
        ("optimizer.step_in_backward: true", "train.clip_norm"),
        "the norm of all gradients is known only when all of them are there",
        "set train.clip_norm: null",
        lambda r: _in_backward(r) and r.train.clip_norm is not None,
    ),
    Rule(
        ("optimizer.step_in_backward: true", "gradient accumulation"),
        "a gradient is used up before the next micro-batch could add to it",
        "make train.global_batch equal to train.micro_batch times the number of workers",
        lambda r: (
            _in_backward(r)
            and (
                r.train.micro_batch == "auto"
                or r.train.global_batch > r.train.micro_batch * max(1, r.scaling.most_workers)
            )
        ),
    ),
    Rule(
        ("optimizer.step_in_backward: true", "scaling.strategy: ddp on several workers"),
        "DDP averages gradients over the workers after they would be used",
        "use scaling.strategy: fsdp2, or one worker",
        lambda r: _in_backward(r) and r.scaling.strategy == "ddp" and r.scaling.most_workers > 1,
    ),
    Rule(
        ("optimizer.step_in_backward: true", "train.master: fp32 in bf16"),
        "fp32 masters take their gradients all at once, after backward",
        "use train.master: stochastic_rounding",
        lambda r: _in_backward(r) and r.train.precision == "bf16" and r.train.master == "fp32",
    ),
)

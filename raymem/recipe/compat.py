"""What goes with what: the one list of refused combinations, used for the error and for the table in the docs.

Every rule is data: the two settings that clash, why, and what to do instead. A method adds its rules here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raymem.errors import RecipeError
from raymem.methods.loram.config import LoRAMOptions
from raymem.recipe.schema import Recipe


@dataclass(frozen=True)
class Rule:
    """Settings that are refused together."""

    settings: tuple[str, ...]
    reason: str
    cure: str
    applies: Callable[[Recipe], bool]


def _nf4(recipe: Recipe) -> bool:
    return recipe.base.quantize == "nf4"


def _loram(recipe: Recipe) -> bool:
    return recipe.base.kind == "loram"


def _prunes(recipe: Recipe) -> bool:
    return isinstance(recipe.base, LoRAMOptions) and recipe.base.artifact is None


def _full_training(recipe: Recipe) -> bool:
    return recipe.adapter.kind == "none"


def _mlorc(recipe: Recipe) -> bool:
    return recipe.optimizer.kind in ("mlorc_adamw", "mlorc_lion")


def _in_backward(recipe: Recipe) -> bool:
    return _mlorc(recipe) and getattr(recipe.optimizer, "step_in_backward", False)


def _most_workers(recipe: Recipe) -> int:
    return max(1, recipe.scaling.most_workers)


def _dtype_clash(recipe: Recipe) -> bool:
    dtype, precision = recipe.model.dtype, recipe.train.precision
    if dtype == "auto":
        return False
    if recipe.train.is_mixed:
        return dtype == "bf16" and _full_training(recipe)
    return dtype != precision


RULES: tuple[Rule, ...] = (
    Rule(
        ("base.quantize: nf4", "adapter: none"),
        "4-bit weights are frozen, so there would be nothing to train",
        "use adapter: lora, or base.quantize: none",
        lambda r: _nf4(r) and _full_training(r),
    ),
    Rule(
        ("base.quantize: nf4", "scaling.strategy: fsdp2"),
        "bitsandbytes packs a weight into bytes that FSDP2 cannot shard by rows, and this is not tested",
        "use scaling.strategy: ddp",
        lambda r: _nf4(r) and r.scaling.strategy == "fsdp2",
    ),
    Rule(
        ("base.quantize: nf4", "model.config"),
        "random weights are not worth quantising, and this is not tested",
        "give model.name",
        lambda r: _nf4(r) and r.model.config is not None,
    ),
    Rule(
        ("base.kind: loram", "adapter: none"),
        "only an adapter can be recovered for the full model",
        "use adapter: lora or moram; the pruned model itself is trained by base.align",
        lambda r: _loram(r) and _full_training(r),
    ),
    Rule(
        ("base.kind: loram", "model.config"),
        "random weights are not worth pruning",
        "give model.name",
        lambda r: _loram(r) and r.model.config is not None,
    ),
    Rule(
        ("base.kind: loram", "storage.path on an object store"),
        "the pruned model is written and read layer by layer, as plain files",
        "use a shared directory, or prune into one and give it as base.artifact",
        lambda r: _prunes(r) and "://" in r.storage.path,
    ),
    Rule(
        ("optimizer: mlorc_adamw or mlorc_lion", "an adapter"),
        "the factors of an adapter are already of low rank, so there is nothing to compress",
        "use adapter: none, or optimizer: adamw",
        lambda r: _mlorc(r) and not _full_training(r),
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
            and (r.train.micro_batch == "auto" or r.train.global_batch > r.train.micro_batch * _most_workers(r))
        ),
    ),
    Rule(
        ("optimizer.step_in_backward: true", "scaling.strategy: ddp on several workers"),
        "DDP averages gradients over the workers after they would be used",
        "use scaling.strategy: fsdp2, or one worker",
        lambda r: _in_backward(r) and r.scaling.strategy == "ddp" and _most_workers(r) > 1,
    ),
    Rule(
        ("optimizer.step_in_backward: true", "train.master: fp32 in bf16"),
        "fp32 masters take their gradients all at once, after backward",
        "use train.master: stochastic_rounding",
        lambda r: _in_backward(r) and r.train.precision == "bf16" and r.train.master == "fp32",
    ),
    Rule(
        ("activations.side_stream: true", "scaling.use_gpu: false"),
        "streams run side by side on GPUs only",
        "set scaling.use_gpu: true, or leave activations.side_stream out",
        lambda r: getattr(r.activations, "side_stream", False) and not r.scaling.use_gpu,
    ),
    Rule(
        ("scaling.strategy: fsdp2", "scaling.num_workers: 0"),
        "sharding needs worker processes",
        "set scaling.num_workers to 1 or more, or scaling.strategy: ddp",
        lambda r: r.scaling.strategy == "fsdp2" and r.scaling.num_workers == 0,
    ),
    Rule(
        ("train.master: stochastic_rounding", "train.precision: fp32 or bf16_mixed"),
        "trainable weights are fp32 there, so nothing is rounded",
        "use train.precision: bf16, or leave train.master out",
        lambda r: r.train.master == "stochastic_rounding" and r.train.precision != "bf16",
    ),
    Rule(
        ("model.dtype", "train.precision"),
        "the precision already fixes the storage dtype of trained weights; a frozen base may differ in bf16_mixed",
        "leave model.dtype out, or make the two agree",
        _dtype_clash,
    ),
    Rule(
        ("storage.keep: best", "no data.eval"),
        "checkpoints are ranked by evaluation loss",
        "add data.eval, or use storage.keep: last",
        lambda r: r.storage.keep == "best" and r.data.eval is None,
    ),
)


def check(recipe: Recipe, place: str = "recipe") -> None:
    """Refuse a recipe whose settings clash.

    Raises:
        RecipeError: names the settings, the reason and the cure of every rule that applies.
    """
    broken = [rule for rule in RULES if rule.applies(recipe)]
    if broken:
        raise RecipeError(
            "\n".join(f"{place}: {' with '.join(r.settings)} is refused: {r.reason}; {r.cure}" for r in broken)
        )


def table() -> str:
    """The rules as a Markdown table for the docs."""
    rows = [f"| {' + '.join(f'`{s}`' for s in r.settings)} | {r.reason} | {r.cure} |" for r in RULES]
    return "\n".join(["| refused together | why | instead |", "|---|---|---|", *rows]) + "\n"

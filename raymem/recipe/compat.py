"""Combinations of settings that raymem refuses, used for the error and for the table in the docs.

Every rule is data: the two settings that clash, why, and what to do instead. Rules of one kind stand with that kind;
this module holds those that belong to none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from raymem.errors import RecipeError
from raymem.kinds import Kind, Rule
from raymem.recipe.axes import ADAPTERS, BASES, OPTIMIZERS, all_kinds, chosen
from raymem.recipe.schema import Recipe


def _nf4(recipe: Recipe) -> bool:
    return bool(recipe.base.quantize == "nf4")


def _dtype_clash(recipe: Recipe) -> bool:
    dtype, precision = recipe.model.dtype, recipe.train.precision
    if dtype == "auto":
        return False
    if recipe.train.is_mixed:
        return dtype == "bf16" and not recipe.trains_adapter
    return dtype != precision


RULES: tuple[Rule, ...] = (
    Rule(
        ("base.quantize: nf4", "adapter: none"),
        "4-bit weights are frozen, so there would be nothing to train",
        "use adapter: lora, or base.quantize: none",
        lambda r: _nf4(r) and not r.trains_adapter,
    ),
    Rule(
        ("base.quantize: nf4", "model.config"),
        "random weights are not worth quantising, and this is not tested",
        "give model.name",
        lambda r: _nf4(r) and r.model.config is not None,
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
        ("train.master: stochastic_rounding", "an optimizer that cannot round at random"),
        "its bf16 weights would lose every update smaller than a rounding step",
        "leave train.master out, or use another optimizer",
        lambda r: r.train.master == "stochastic_rounding" and not OPTIMIZERS.of(r).rounds,
    ),
    Rule(
        ("base.offload: true", "an adapter that reads base weights outside of their layer's run"),
        "it would find them on the host",
        "use adapter: lora, or leave base.offload out",
        lambda r: r.trains_adapter and BASES.of(r).is_streamed(r.base) and ADAPTERS.of(r).reads_base,
    ),
    Rule(
        ("model.dtype", "train.precision"),
        "the precision already fixes the storage dtype of trained weights; a frozen base may differ in bf16_mixed",
        "leave model.dtype out, or make the two agree",
        _dtype_clash,
    ),
    Rule(
        ("train.score_every", "no metric in data.eval"),
        "nothing says how answers are judged",
        "give a source of data.eval a metric, or leave score_every out",
        lambda r: r.train.score_every is not None and not r.data.score_names,
    ),
    Rule(
        ("train.score_every", "scaling.num_workers: 0"),
        "answers are judged by a task of Ray, beside the training",
        "set scaling.num_workers to 1 or more, or leave it out and let raymem evaluate judge the result",
        lambda r: r.train.score_every is not None and r.scaling.num_workers == 0,
    ),
    Rule(
        ("train.score_every", "scaling.strategy: fsdp2 on several workers"),
        "the task that judges answers has the resources of one worker, which need not hold the model",
        "use scaling.strategy: ddp, or leave it out and let raymem evaluate, which shares the model, judge the result",
        lambda r: r.train.score_every is not None and r.scaling.shares_model,
    ),
    Rule(
        ("storage.keep: best", "no data.eval"),
        "checkpoints are ranked by evaluation loss",
        "add data.eval, or use storage.keep: last",
        lambda r: r.storage.keep == "best" and r.data.eval is None,
    ),
)


def check(recipe: Recipe, where: str = "recipe") -> None:
    """Refuse a recipe whose settings clash.

    Raises:
        RecipeError: names the settings, the reason and the cure of every rule that applies.
    """
    broken = [rule for rule in [*RULES, *_rules_of(chosen(recipe))] if rule.applies(recipe)]
    if broken:
        raise RecipeError(
            "\n".join(f"{where}: {' with '.join(r.settings)} is refused: {r.reason}; {r.cure}" for r in broken)
        )


def _rules_of(kinds: Iterable[Kind[Any]]) -> Iterator[Rule]:
    seen: set[tuple[str, ...]] = set()
    for kind in kinds:
        for rule in kind.rules():
            if rule.settings not in seen:  # kinds of one method share theirs
                seen.add(rule.settings)
                yield rule


def all_rules() -> list[Rule]:
    """Return all rules, those of registered kinds included."""
    return [*RULES, *_rules_of(all_kinds())]


def table() -> str:
    """Format the rules as a Markdown table for the docs."""
    rows = [f"| {' + '.join(f'`{s}`' for s in r.settings)} | {r.reason} | {r.cure} |" for r in all_rules()]
    return "\n".join(["| refused together | why | instead |", "|---|---|---|", *rows]) + "\n"

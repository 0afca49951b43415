"""Lists the changes of a recipe that lower a memory term: those of registered kinds, and those that belong to none."""

from __future__ import annotations

from typing import Any

from raymem.errors import RecipeError
from raymem.kinds import Advice
from raymem.recipe.axes import all_kinds
from raymem.recipe.load import recipe_of

_PER_ROW = ("activations", "loss", "workspace")
_SHORTEST = 256
"""Rows are not proposed to be shorter than that."""

GENERAL = (
    Advice(
        "base.quantize=nf4", ("weights",), 50,
        applies=lambda r: r.trains_adapter and r.base.quantize == "none",
        time="more: frozen weights are expanded again for every product",
    ),
    Advice(
        "scaling.strategy=fsdp2", ("weights", "trainable", "gradients", "optimizer"), 55,
        applies=lambda r: r.scaling.strategy == "ddp" and r.scaling.least_workers > 1,
        exact=True, time="more: weights are gathered over the network in every pass",
    ),
    Advice(
        "train.precision=bf16", (), 80, applies=lambda r: r.train.precision == "fp32",
        time="less where the device multiplies bf16 faster, as GPUs do",
    ),
)  # fmt: skip


def changes(recipe: Any) -> list[Advice]:
    """List changes that may lower the peak of a recipe: those that leave the result as it is first, then the cheapest.

    None of them is set already, and the recipe with any one of them is valid.
    """
    advice = [*GENERAL, *(item for kind in all_kinds() for item in kind.advice())]
    advice = [item for item in advice if item.applies(recipe)] + [*_fewer_rows(recipe), *_shorter_rows(recipe)]
    ordered = sorted(advice, key=lambda item: (not item.exact, item.cost))
    unique = {item.override: item for item in reversed(ordered)}
    return [item for item in ordered if unique[item.override] is item and _is_valid(recipe, item.override)]


def would_help(term: str, recipe: Any) -> tuple[str, ...]:
    """List settings that lower a memory term of a recipe, in the order of :func:`changes`."""
    return tuple(item.override for item in changes(recipe) if term in item.terms)


def _fewer_rows(recipe: Any) -> list[Advice]:
    """Propose half a micro-batch, and one row."""
    if recipe.train.micro_batch == "auto":
        return []
    rows, time = recipe.train.rows_per_pass, "little as long as fewer rows keep the device busy: more, smaller passes"
    sizes = dict.fromkeys(size for size in (rows // 2, 1) if 1 <= size < rows)
    return [Advice(f"train.micro_batch={size}", _PER_ROW, 25, exact=True, time=time) for size in sizes]


def _shorter_rows(recipe: Any) -> list[Advice]:
    """Propose rows of half the length."""
    length = recipe.data.sequence_length // 2
    if length < _SHORTEST:
        return []
    return [Advice(f"data.sequence_length={length}", _PER_ROW, 90, time="less per step, since rows hold fewer tokens")]


def _is_valid(recipe: Any, override: str) -> bool:
    try:
        recipe_of(recipe.to_dict(), [override], resolve=False)
    except RecipeError:
        return False
    return True

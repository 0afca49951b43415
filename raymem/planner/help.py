"""Lists the changes of a recipe that lower a memory term: those of registered kinds, and those that belong to none."""

from __future__ import annotations

from typing import Any

from raymem.kinds import Advice
from raymem.recipe.axes import all_kinds


def _is_spread(recipe: Any) -> bool:
    return bool(recipe.scaling.strategy == "ddp" and recipe.scaling.least_workers > 1)


def _never(recipe: Any) -> bool:
    return False


GENERAL = (
    Advice("train.micro_batch=1", ("activations", "loss", "workspace"), 25, applies=_never),  # smaller steps are tried
    Advice("base.quantize=nf4", ("weights",), 50, applies=lambda r: r.trains_adapter and r.base.quantize == "none"),
    Advice("scaling.strategy=fsdp2", ("weights", "trainable", "gradients", "optimizer"), 55, applies=_is_spread),
    Advice("train.precision=bf16", (), 80, applies=lambda r: r.train.precision == "fp32"),
    Advice("data.sequence_length", ("activations", "loss", "workspace"), 90, applies=_never),
)


def would_help(term: str) -> tuple[str, ...]:
    """List settings that lower a memory term, the cheapest in time and quality first."""
    advice = [*GENERAL, *(item for kind in all_kinds() for item in kind.advice())]
    fitting = sorted((item for item in advice if term in item.terms), key=lambda item: item.cost)
    return tuple(dict.fromkeys(item.override for item in fitting))


def candidates(recipe: Any) -> list[str]:
    """List overrides that may lower the peak of a recipe, the cheapest in time and quality first."""
    advice = [*GENERAL, *(item for kind in all_kinds() for item in kind.advice())]
    costs = [(item.cost, item.override) for item in advice if item.applies(recipe)]
    costs += [(25, f"train.micro_batch={rows}") for rows in _smaller(recipe.train.rows_per_pass)]
    if recipe.data.sequence_length >= 512:
        costs.append((90, f"data.sequence_length={recipe.data.sequence_length // 2}"))
    return list(dict.fromkeys(override for _, override in sorted(costs, key=lambda item: item[0])))


def _smaller(rows: int) -> list[int]:
    """Propose half a micro-batch, and one row."""
    return list(dict.fromkeys(size for size in (rows // 2, 1) if 1 <= size < rows))

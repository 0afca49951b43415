"""Finds the single changes of a recipe, or if need be the few together, that make it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raymem.errors import RecipeError
from raymem.memory.budget import Fits
from raymem.planner.help import candidates
from raymem.planner.process import plan_many
from raymem.planner.types import Plan
from raymem.recipe.schema import Recipe

_MOST_TOGETHER = 3

Load = Callable[[Sequence[str]], Recipe]
"""Reads the recipe with further overrides.

Raises:
    RecipeError: they do not go together.
"""


@dataclass(frozen=True)
class Advice:
    """The overrides that make a recipe fit, as ``--set`` takes them."""

    overrides: tuple[str, ...]
    plan: Plan


def advise(load: Load, budget_bytes: int, gpu: str | None = None) -> list[Advice]:
    """Find changes after which the recipe fits: the fewest together, of equally many those with the lowest peak first.

    The result of training stays the same under the changes of batch split, checkpointing and kernels, and close to it
    under the others; no change of data or model is proposed but the row length, as the last resort.

    Args:
        load: reads the recipe.
        budget_bytes: per worker device.
        gpu: as for :func:`raymem.planner.plan_recipe`.
    """
    chosen: tuple[str, ...] = ()
    for _ in range(_MOST_TOGETHER):
        tried = _try_each(load, chosen, gpu)
        fitting = [a for a in tried if isinstance(a.plan.verdict(budget_bytes), Fits)]
        if fitting:
            return sorted(fitting, key=lambda a: a.plan.capacity_bytes)
        if not tried:
            return []
        chosen = min(tried, key=lambda a: a.plan.capacity_bytes).overrides
    return []


def _try_each(load: Load, chosen: tuple[str, ...], gpu: str | None) -> list[Advice]:
    recipe = load(chosen)
    combined: list[tuple[tuple[str, ...], Recipe]] = []
    for override in candidates(recipe):
        try:
            combined.append(((*chosen, override), load((*chosen, override))))
        except RecipeError:
            continue
    plans = plan_many([changed for _, changed in combined], gpu=gpu)
    return [Advice(o, plan) for (o, _), plan in zip(combined, plans, strict=True) if isinstance(plan, Plan)]

"""Finds the largest micro-batch of a new recipe that fits, and what has to change where not even one row does."""

from __future__ import annotations

from dataclasses import dataclass

from raymem.errors import BudgetExceeded
from raymem.memory.budget import bytes_text
from raymem.planner.help import changes, would_help
from raymem.planner.process import Planner
from raymem.planner.types import Above, Plan
from raymem.recipe.load import recipe_of
from raymem.recipe.schema import Recipe
from raymem.training.reporter import Status

_LEFT_ALONE = ("train.micro_batch", "data.", "scaling.", "adapter", "optimizer")


@dataclass(frozen=True)
class Fitted:
    """A recipe that fits."""

    recipe: Recipe
    overrides: tuple[str, ...]
    """The changes that it took, as ``--set`` takes them."""
    plan: Plan


def fit(recipe: Recipe, budget_bytes: int, gpu: str | None, most: int, status: Status) -> Fitted:
    """Return the recipe with the largest power of two up to ``most`` as its micro-batch, changed only if it must be.

    Args:
        budget_bytes: memory of one worker's device.
        gpu: as of :func:`raymem.planner.plan_recipe`.

    Raises:
        BudgetExceeded: nothing that leaves model and method as they are makes it fit.
        RaymemError: it cannot be planned.
    """
    taken: tuple[str, ...] = ()
    with Planner(gpu=gpu) as planner:
        while True:
            sizes = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
            while sizes:
                rows = sizes.pop()
                status(f"planning the memory of {' '.join((f'micro-batch {rows}', *taken))}")
                changed = _changed(recipe, (*taken, f"train.micro_batch={rows}"))
                plan = planner.plan_within(changed, budget_bytes)
                if isinstance(plan, Plan) and plan.capacity_bytes <= budget_bytes:
                    return Fitted(changed, taken, plan)
            relief = _relief(_changed(recipe, (*taken, "train.micro_batch=1")))
            if relief is None:
                needs = plan.at_least_bytes if isinstance(plan, Above) else plan.capacity_bytes
                raise BudgetExceeded(
                    f"{recipe.model.name}: not even one row at a time fits into {bytes_text(budget_bytes)}"
                    f"{' with ' + ' and '.join(taken) if taken else ''}: it takes {bytes_text(needs)} or more; take a "
                    "smaller model, a larger GPU (--gpu, --budget), or another --method"
                )
            taken = (*taken, relief)


def _relief(recipe: Recipe) -> str | None:
    """Return the change that costs least, of those that leave model, data and method as they are."""
    possible = {item.override for item in changes(recipe)}
    for override in (*would_help("activations", recipe), "train.precision=bf16", *would_help("weights", recipe)):
        axis = override.partition("=")[0]
        chosen = getattr(recipe, axis, None) is not None and _is_chosen(recipe, axis)
        if override in possible and not chosen and not override.startswith(_LEFT_ALONE):
            return override
    return None


def _is_chosen(recipe: Recipe, axis: str) -> bool:
    """Say whether an axis is no longer what a recipe has that says nothing of it."""
    return bool(getattr(recipe, axis) != type(recipe).model_fields[axis].get_default(call_default_factory=True))


def _changed(recipe: Recipe, overrides: tuple[str, ...]) -> Recipe:
    return recipe_of(recipe.to_dict(), overrides)

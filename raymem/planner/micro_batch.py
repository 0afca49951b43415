"""Chooses the largest batch that fits, for ``train.micro_batch: auto``."""

from __future__ import annotations

from collections.abc import Callable

from raymem.errors import RecipeError
from raymem.memory.budget import bytes_text, parse_bytes
from raymem.memory.devices import gpu_named
from raymem.planner.process import Planner
from raymem.planner.types import Target
from raymem.recipe.schema import Recipe


def choose_micro_batch(
    recipe: Recipe, *, budget_bytes: int | None = None, gpu: str | None = None, status: Callable[[str], None] = print
) -> Recipe:
    """Replace ``micro_batch: auto`` by a number; a recipe that has one comes back as it is.

    The number is the one with the fewest micro-batches per step within a worker's budget. If even one row at a time
    does not fit, it is one row, and the verdict on that recipe says the rest.

    Args:
        budget_bytes: of one worker's device; by default the recipe's, or what the GPU has.
        gpu: as of :func:`raymem.planner.plan_recipe`.
        status: told the choice.

    Raises:
        RecipeError: there is nothing to fit into.
        RaymemError: the recipe cannot be planned.
    """
    if recipe.train.micro_batch != "auto":
        return recipe
    if budget_bytes is None and recipe.budget is not None:
        budget_bytes = parse_bytes(recipe.budget)
    if budget_bytes is None and gpu is not None:
        budget_bytes = gpu_named(gpu).capacity_bytes
    if budget_bytes is None:
        raise RecipeError("train.micro_batch: auto needs to know how much there is: set budget (24GiB), or a number")
    limit = budget_bytes
    rows = -(-recipe.train.global_batch // Target.of(recipe).num_workers)
    with Planner(gpu=gpu) as planner:

        def fits(passes: int) -> bool:
            return planner.plan(with_micro_batch(recipe, -(-rows // passes))).capacity_bytes <= limit

        passes = 1
        # One pass keeps no gradients beside activations, so only from two on more passes always take less.
        if not fits(1):
            low, high = 2, rows
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if fits(middle) else (middle + 1, high)
            passes = min(low, rows)
    chosen = -(-rows // passes)
    status(f"train.micro_batch: auto is {chosen} of {rows} rows with {bytes_text(limit)}")
    return with_micro_batch(recipe, chosen)


def with_micro_batch(recipe: Recipe, rows: int) -> Recipe:
    """Return the recipe with ``rows`` rows per forward pass."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": rows})})

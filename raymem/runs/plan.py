"""Plans a recipe, in the same way for the command, the Python API and Kubernetes manifests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from raymem.errors import BudgetError
from raymem.memory.budget import parse_bytes
from raymem.memory.devices import gpu_named
from raymem.planner import Plan, plan_recipe
from raymem.recipe.schema import Recipe

log = logging.getLogger(__name__)


def plan_run(
    recipe: Recipe, *, budget_bytes: int | None = None, gpu: str | None = None, status: Callable[[str], None] = log.info
) -> tuple[Recipe, Plan]:
    """Return the recipe with a number as its micro-batch, and its plan.

    Args:
        budget_bytes: what ``micro_batch: auto`` is to fit into; by default the recipe's budget, or the GPU's memory.
        gpu: kind of GPU, such as ``H100-80GB``; by default what the recipe says.
        status: told the micro-batch that was chosen.

    Raises:
        RaymemError: the recipe does not go with its model, there is nothing to fit into, or an unknown GPU.
    """
    if recipe.train.micro_batch == "auto":
        from raymem.runs.resolve import resolve_micro_batch  # loads torch, which plans of known models do without

        recipe = resolve_micro_batch(recipe, budget_bytes=budget_bytes, gpu=gpu, status=status)
    if recipe.model.name is not None and Path(recipe.model.name).is_dir():
        from raymem.training.model.check import check_weights_here

        check_weights_here(recipe)
    return recipe, plan_recipe(recipe, gpu=gpu)


def budget_bytes(recipe: Recipe, budget: str | None, gpu: str | None, *, where: str) -> int | None:
    """Return the budget that holds: the given one, the GPU's memory, or the recipe's; None if there is none.

    Args:
        where: what an error calls ``budget``.

    Raises:
        BudgetError: it cannot be read, or the GPU is unknown.
    """
    known = None if gpu is None else gpu_named(gpu)
    if budget is not None:
        try:
            return parse_bytes(budget)
        except ValueError as error:
            raise BudgetError(f"{where}: {error}") from None
    if known is not None:
        return known.capacity_bytes
    return None if recipe.budget is None else parse_bytes(recipe.budget)

"""Names the weights that a recipe trains on: those of its model, or of the pruned one that stands in for it."""

from __future__ import annotations

from raymem.recipe.axes import BASES
from raymem.recipe.schema import Recipe


def base_name(recipe: Recipe) -> tuple[str | None, str | None]:
    """Return directory or Hugging Face id of the weights, and revision; None for random ones.

    Raises:
        ModelError: it is still to be made.
    """
    own = BASES.of(recipe).directory(recipe.base)
    return (recipe.model.name, recipe.model.revision) if own is None else (own, None)

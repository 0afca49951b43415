"""Which weights a recipe trains on: the model that it names, or the pruned one that stands in for it."""

from __future__ import annotations

from raymem.errors import ModelError
from raymem.methods.loram.config import LoRAMOptions
from raymem.recipe.schema import Recipe


def pruned_directory(recipe: Recipe) -> str | None:
    """Directory of the pruned model that a recipe trains on; None if it trains on the full one.

    Raises:
        ModelError: it is not pruned yet.
    """
    if not isinstance(recipe.base, LoRAMOptions):
        return None
    if recipe.base.artifact is None:
        raise ModelError(
            f"base.kind: loram: {recipe.model.name} is not pruned yet; run `raymem loram prune` with this recipe, or "
            "give the directory of a pruned model as base.artifact"
        )
    return recipe.base.artifact


def base_name(recipe: Recipe) -> tuple[str | None, str | None]:
    """Directory or Hugging Face id of the weights, and revision; None for random ones.

    Raises:
        ModelError: see :func:`pruned_directory`.
    """
    pruned = pruned_directory(recipe)
    return (recipe.model.name, recipe.model.revision) if pruned is None else (pruned, None)

"""The run that a driver hands to the workers that train."""

from __future__ import annotations

from dataclasses import dataclass

from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.training.data.shards import Prepared


@dataclass(frozen=True)
class PreparedRun:
    """A resolved run with its data tokenised and packed: all that the first step needs."""

    recipe: Recipe
    storage: Storage
    run: Storage
    """The run's own directory in it."""
    train_data: Prepared
    eval_data: Prepared | None

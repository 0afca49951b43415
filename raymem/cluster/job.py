"""What the driver hands to whoever trains."""

from __future__ import annotations

from dataclasses import dataclass

from raymem.training.data.shards import Prepared
from raymem.training.recipe import Recipe
from raymem.training.storage import Storage


@dataclass(frozen=True)
class Job:
    """Everything that is settled before the first step."""

    recipe: Recipe
    storage: Storage
    run: Storage
    train_data: Prepared
    eval_data: Prepared | None

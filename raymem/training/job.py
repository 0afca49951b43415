"""What the driver hands to whoever trains."""

from __future__ import annotations

from dataclasses import dataclass

from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.training.data.shards import Prepared


@dataclass(frozen=True)
class Ready:
    """What a stage of LoRAM has done before it starts a run on a base that it has checked, so that it is done once."""

    asked: str | None
    """The revision that the user's recipe names; that of the run is resolved."""
    tokenizer: str
    """Directory in the cache."""
    train_data: Prepared


@dataclass(frozen=True)
class Job:
    """Everything that is settled before the first step."""

    recipe: Recipe
    storage: Storage
    run: Storage
    train_data: Prepared
    eval_data: Prepared | None

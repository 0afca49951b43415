"""A run of which nothing is left open, and the base that it trains on. Only :mod:`raymem.runs.resolve` makes one."""

from __future__ import annotations

from dataclasses import dataclass

from raymem.errors import ModelError
from raymem.recipe.schema import Recipe
from raymem.runs.backend import Backend
from raymem.runs.loram.models import PlannedModel, PrunedModel
from raymem.storage.storage import Storage


@dataclass(frozen=True)
class FullModel:
    """The model that the recipe names, as it is."""


Base = FullModel | PrunedModel | PlannedModel


@dataclass(frozen=True)
class ResolvedRun:
    """Everything that a recipe leaves open, decided."""

    recipe: Recipe
    """As it is trained: a number as micro-batch, a commit as revision, directories for demo models and pruned bases."""
    base: Base
    tokenizer: str
    """Directory in the cache."""
    storage: Storage
    run: Storage
    """The run's own directory in it."""
    backend: Backend
    asked: Recipe
    """As the user gave it, but for the micro-batch: the planner knows it by these names."""

    def require_base(self) -> FullModel | PrunedModel:
        """The base, if it can be trained on.

        Raises:
            ModelError: it is not pruned or aligned yet, with the command that does it.
        """
        if isinstance(self.base, PlannedModel):
            raise ModelError(self.base.missing)
        return self.base

"""Defines a run of which nothing is left open, and its base. Only :mod:`raymem.runs.resolve` makes one."""

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
    """A run for which everything that its recipe leaves open is decided."""

    recipe: Recipe
    """The recipe as trained: micro-batch a number, revision a commit, demo models and pruned bases as directories."""
    base: Base
    tokenizer: str
    """The tokenizer's directory in the cache."""
    storage: Storage
    run: Storage
    """The run's own directory in the storage."""
    backend: Backend
    asked: Recipe
    """The recipe as the user gave it, but for the micro-batch: the planner knows it by these names."""

    def require_base(self) -> FullModel | PrunedModel:
        """Return the base if it can be trained on.

        Raises:
            ModelError: it is not pruned or aligned yet, with the command that does it.
        """
        if isinstance(self.base, PlannedModel):
            raise ModelError(self.base.missing)
        return self.base

"""A run of which nothing is left open, and the base that it trains on. Only :mod:`raymem.runs.resolve` makes one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from raymem.errors import ModelError
from raymem.methods.loram.manifest import Manifest
from raymem.methods.loram.source import Source
from raymem.recipe.schema import Recipe
from raymem.runs.backend import Backend
from raymem.storage.storage import Storage
from raymem.training.data.shards import Prepared


@dataclass(frozen=True)
class FullModel:
    """The model that the recipe names, as it is."""


@dataclass(frozen=True)
class PruningSite:
    """The model that is pruned, and where the result lies once that is done."""

    source: Source
    """The full model."""
    calibration: torch.Tensor | None
    directory: Path
    """The pruned model, before any alignment."""
    alignment: Alignment | None = None
    """None where the recipe has none, and until the model is pruned."""


@dataclass(frozen=True)
class PrunedModel:
    """A pruned (and, where the recipe says so, aligned) model that lies on disk."""

    directory: Path
    manifest: Manifest
    source: Source | None
    """The full model; None where only the hub has it, and the recipe names the pruned one."""
    site: PruningSite | None
    """None where the recipe names the directory."""


@dataclass(frozen=True)
class PlannedModel:
    """A pruned model that has to be made before anything can be trained on it."""

    site: PruningSite
    missing: str
    """The stage that is missing, and the command that does it."""


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


@dataclass(frozen=True)
class Alignment:
    """The run that trains a pruned model itself before its adapter; it is named by its content."""

    run: ResolvedRun
    train_data: Prepared

    @property
    def model(self) -> Path:
        """Directory of the model that it leaves."""
        return Path(self.run.run.join("model"))

"""Describes the pruned model of a run: where it is made, from which model, and which run aligns it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raymem.methods.loram import Manifest, Plan, PruneOptions, plan_pruning
from raymem.methods.loram.source import Source
from raymem.training.data.packed.shards import Prepared

if TYPE_CHECKING:
    from raymem.runs.resolved import ResolvedRun


@dataclass(frozen=True)
class PruningSite:
    """The model to be pruned, and the paths of the result once that is done."""

    source: Source
    """The full model."""
    calibration: torch.Tensor | None
    name: str
    """Name of the pruned model in the storage, before any alignment."""
    location: str
    """Directory or address of that."""
    alignment: Alignment | None = None
    """The run that aligns it; None where the recipe has none, and until the model is pruned."""


@dataclass(frozen=True)
class PrunedModel:
    """A pruned (and, where the recipe says so, aligned) model that is there."""

    location: str
    """Its directory or address."""
    directory: Path
    """Its files on this node; weights of an object store are fetched into it where they are read."""
    manifest: Manifest
    source: Source | None
    """The full model; None where only the hub has it, and the recipe names the pruned one."""
    site: PruningSite | None
    """Where the model was made; None where the recipe names it."""


@dataclass(frozen=True)
class PlannedModel:
    """A pruned model that has to be made before anything can be trained on it."""

    site: PruningSite
    missing: str
    """The missing stage, and the command that does it."""


@dataclass(frozen=True)
class Alignment:
    """A run that trains a pruned model itself before its adapter; it is named by its content."""

    run: ResolvedRun
    train_data: Prepared

    @property
    def model(self) -> str:
        """Return directory or address of the model that the run leaves."""
        return self.run.run.join("model")


@dataclass(frozen=True)
class PrunedBase:
    """A pruned model beside the full one."""

    plan: Plan
    location: str
    """Directory or address of the pruned model, aligned if the recipe says so."""
    directory: Path
    """Its files on this node; weights of an object store are fetched into it where they are read."""
    manifest: Manifest
    source: Source
    """The full model."""
    run: ResolvedRun


def beside_full(run: ResolvedRun, pruned: PrunedModel, source: Source) -> PrunedBase:
    """Return a pruned model with the plan by which it was made of the full one."""
    manifest = pruned.manifest
    ratios = manifest.options["layer_ratios"]
    options = PruneOptions(**{**manifest.options, "layer_ratios": None if ratios is None else tuple(ratios)})
    plan = plan_pruning(source.config(), options)
    return PrunedBase(plan, pruned.location, pruned.directory, manifest, source, run)

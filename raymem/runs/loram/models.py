"""Describes the pruned model of a run: where it is made, from which model, and which run aligns it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raymem.methods.loram.manifest import Manifest
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
    directory: Path
    """The pruned model, before any alignment."""
    alignment: Alignment | None = None
    """The run that aligns it; None where the recipe has none, and until the model is pruned."""


@dataclass(frozen=True)
class PrunedModel:
    """A pruned (and, where the recipe says so, aligned) model that lies on disk."""

    directory: Path
    manifest: Manifest
    source: Source | None
    """The full model; None where only the hub has it, and the recipe names the pruned one."""
    site: PruningSite | None
    """Where the model was made; None where the recipe names the directory."""


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
    def model(self) -> Path:
        """Return the directory of the model that the run leaves."""
        return Path(self.run.run.join("model"))

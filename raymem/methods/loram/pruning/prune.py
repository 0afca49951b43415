"""Pruning in one process: every step in turn. A cluster runs the same steps in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from raymem.errors import ModelError
from raymem.methods.loram.config import PruneOptions
from raymem.methods.loram.manifest import Manifest, read_manifest
from raymem.methods.loram.pruning.job import PruneJob, commit, is_committed, open_job
from raymem.methods.loram.pruning.layerwise import LayerwiseModel
from raymem.methods.loram.pruning.steps import Step, is_done, layerwise_model, memory_bytes, run_step, steps


def prune_model(
    model: str | Path,
    out: str | Path,
    options: PruneOptions,
    calibration: torch.Tensor | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[Step], None] = lambda step: None,
) -> Manifest:
    """Prune a model on disk, one decoder layer in memory at a time; a killed call goes on where it was.

    Args:
        model: directory of the full model, as ``save_pretrained`` writes it.
        out: directory that appears when the pruned model is whole.
        calibration: token ids [N, T] (int64, no padding) for taylor, wanda and sparsegpt; 10 x 64 is LLM-Pruner's.
        name: Hugging Face id that adapters shall name as their base, if ``model`` is a download.
        revision: commit of that id.
        device: where layers run; random and magnitude always run on the CPU.
        progress: called before every step that is not done.

    Raises:
        ModelError: unknown architecture, damaged or pruned source, or ``out`` holds something else.
        RecipeError: options that do not fit the model.
        DataError: calibration missing, superfluous or out of the vocabulary.
        StorageError: the result cannot be written.
    """
    job = open_job(model, out, options, calibration, name=name, revision=revision)
    pruning = Pruning(job, device)
    if pruning.is_committed():
        return read_manifest(job.out)
    for step in pruning.steps():
        if not pruning.is_done(step):
            progress(step)
            pruning.run(step)
    return pruning.commit()


class Pruning:
    """A pruning job in steps, to be done here or anywhere that sees its files. Pickled as paths and plain values.

    Args:
        device: where layers run.
    """

    what = "pruning"

    def __init__(self, job: PruneJob, device: torch.device | str = "cpu") -> None:
        self.job, self.device = job, device

    def is_committed(self) -> bool:
        """Say whether the pruned model is there."""
        return is_committed(self.job)

    def steps(self) -> list[Step]:
        """Return all steps, in an order in which they can be done."""
        return steps(self.job)

    def is_done(self, step: Step) -> bool:
        """Say whether a step's result is there, whole."""
        return is_done(self.job, step)

    def memory_bytes(self, step: Step) -> int:
        """Most that a step holds."""
        return memory_bytes(self.job, step)

    def run(self, step: Step) -> None:
        """Do a step, or nothing if it is done.

        Raises:
            ModelError: this machine does not see the model or the workspace, or a shard of the source is damaged.
            StorageError: a result cannot be written.
        """
        job = self.job
        if not Path(job.source.directory).is_dir() or not job.workspace.is_dir():
            directory = job.workspace if Path(job.source.directory).is_dir() else job.source.directory
            raise ModelError(
                f"model.name: {directory} is not there on node {os.uname().nodename}; every node needs the same "
                "directory (storage.path and, for downloads, HF_HOME on a shared file system)"
            )
        layers = None if step.kind in ("rest", "layer") else self._layers()
        try:
            run_step(job, step, layers)
        except BaseException:
            _models.clear()  # what a step was stopped in the middle of
            raise

    def commit(self) -> Manifest:
        """Make the pruned model appear."""
        return commit(self.job)

    def _layers(self) -> LayerwiseModel:
        """Kept between the steps of a process: recording how layers are called takes longer than a small step."""
        key = (self.job.key, str(self.device))
        if key not in _models:
            _models.clear()
            _models[key] = layerwise_model(self.job, self.device)
        return _models[key]


_models: dict[tuple[str, str], LayerwiseModel] = {}

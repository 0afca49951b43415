"""Pruning in one process: every step in turn. A cluster runs the same steps in parallel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from raymem.methods.loram.config import PruneOptions
from raymem.methods.loram.job import PruneJob, commit, is_committed, open_job
from raymem.methods.loram.layerwise import LayerwiseModel
from raymem.methods.loram.manifest import Manifest, read_manifest
from raymem.methods.loram.steps import Step, is_done, layerwise_model, run_step, steps


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
    return finish_job(open_job(model, out, options, calibration, name=name, revision=revision), device, progress)


def finish_job(
    job: PruneJob, device: torch.device | str = "cpu", progress: Callable[[Step], None] = lambda step: None
) -> Manifest:
    """Do what is not done of a job, step after step, and commit it; see :func:`prune_model`."""
    if is_committed(job):
        return read_manifest(job.out)
    layers: LayerwiseModel | None = None
    for step in steps(job):
        if is_done(job, step):
            continue
        progress(step)
        if layers is None and step.kind not in ("rest", "layer"):
            layers = layerwise_model(job, device)
        run_step(job, step, layers)
    return commit(job)

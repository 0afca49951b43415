"""A pruning job as Ray tasks: one per step, as many at once as the steps' order, cores and memory allow.

A task gets plain values and reads and writes files itself; nothing passes through the object store, where it could be
lost with a node. A step that was done is skipped, so a killed worker costs one step and a killed driver nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from raymem.errors import ClusterError, ModelError, RaymemError
from raymem.methods.loram.job import PruneJob, commit, is_committed
from raymem.methods.loram.layerwise import LayerwiseModel
from raymem.methods.loram.manifest import Manifest, read_manifest
from raymem.methods.loram.steps import Step, is_done, layerwise_model, memory_bytes, run_step, steps

LIBRARIES_BYTES = 600 << 20
"""Memory of a worker before it reads anything: torch and transformers."""
MAX_RETRIES = 3


def prune_by_tasks(job: PruneJob, progress: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
    """Do what is not done of a job on the connected cluster, and commit it.

    Args:
        progress: told how many of how many steps are done.

    Raises:
        RaymemError: what a step raised for the user.
        ClusterError: a step's worker died again and again.
    """
    if is_committed(job):
        return read_manifest(job.out)
    everything = steps(job)
    waiting = [step for step in everything if not is_done(job, step)]
    missing = {step.name for step in waiting}
    running: dict[Any, Step] = {}
    window, most_memory = _window()
    remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, retry_exceptions=[OSError])(run_task)
    try:
        while missing:
            ready = [step for step in waiting if missing.isdisjoint(step.after)]
            for step in ready[: window - len(running)]:
                waiting.remove(step)
                # Never more than the largest node has: it would wait for ever. There it then runs alone.
                needed = min(memory_bytes(job, step) + LIBRARIES_BYTES, most_memory)
                running[remote.options(memory=needed).remote(job, step)] = step
            (reference,), _ = ray.wait(list(running))
            step = running.pop(reference)
            _result(reference, step)
            missing.discard(step.name)
            progress(len(everything) - len(missing), len(everything))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    return commit(job)


def run_task(job: PruneJob, step: Step) -> None:
    """One step, on a node."""
    if not Path(job.source.directory).is_dir() or not job.workspace.is_dir():
        directory = job.workspace if Path(job.source.directory).is_dir() else job.source.directory
        raise ModelError(
            f"model.name: {directory} is not there on node {os.uname().nodename}; every node needs the same directory "
            "(storage.path and, for downloads, HF_HOME on a shared file system)"
        )
    run_step(job, step, None if step.kind in ("rest", "layer") else _model(job))


_models: dict[str, LayerwiseModel] = {}


def _model(job: PruneJob) -> LayerwiseModel:
    """Kept between the tasks of a worker: recording how layers are called takes longer than a small step."""
    if job.key not in _models:
        _models.clear()
        _models[job.key] = layerwise_model(job)
    return _models[job.key]


def _window() -> tuple[int, int]:
    """Tasks in flight, two per core so that none waits for the driver; and bytes of the largest node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = sum(int(node.get("CPU", 0)) for node in nodes)
    return max(2, 2 * cores), int(max(node.get("memory", 0) for node in nodes))


def _result(reference: Any, step: Step) -> None:
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaymemError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        text = " ".join(str(error).split())[:200]
        raise ClusterError(
            f"step {step.name} of pruning was lost {1 + MAX_RETRIES} times ({text}); the steps that are done are kept: "
            "run the same command again, on nodes with more memory if it ran out"
        ) from error

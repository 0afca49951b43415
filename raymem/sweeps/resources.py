"""Computes the resources that a trial takes from the cluster, and how many trials fit at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from raymem.cluster.connection import worker_resources
from raymem.errors import BudgetError
from raymem.memory.budget import bytes_text
from raymem.recipe.schema import Recipe
from raymem.training.reporter import Status

RUNTIME_BYTES = 1 << 30
"""Host memory of a trial's process besides its tensors: Python, Ray and torch."""


def nested(recipe: Recipe) -> bool:
    """Say whether a trial has worker processes of its own; else it trains in its own process."""
    return recipe.scaling.num_workers not in (0, 1) or recipe.scaling.strategy == "fsdp2"


def admitted_bytes(recipe: Recipe, budget_bytes: int, status: Status) -> int:
    """Return the budget, or on CPU what the nodes have for a worker of any trial, if that is less.

    Raises:
        BudgetError: they have nothing, or cannot hold one trial.
    """
    if recipe.scaling.use_gpu:
        return budget_bytes
    if nested(recipe):
        most, where = _most_of_workers(recipe), "the cluster has for each worker"
    else:
        able = [node for node in _nodes() if _holds(node["Resources"], _of_process(recipe))]
        if not able:
            status(f"warning: no node has {_of_process(recipe)} yet; trials wait for one")
            return budget_bytes
        # Ray Tune looks at cores only, so any of them may get the largest trial.
        node = min(able, key=lambda node: float(node["Resources"].get("memory", 0)))
        most = int(node["Resources"].get("memory", 0)) - RUNTIME_BYTES
        where = f"node {node['NodeManagerAddress']} has"
    if most <= 0:
        raise BudgetError(
            f"memory: {where} no more than the {bytes_text(RUNTIME_BYTES)} that a process takes besides its tensors; "
            "use nodes with more"
        )
    if most < budget_bytes:
        status(f"warning: the budget is more than {where}; trials may take {bytes_text(most)}")
    return min(most, budget_bytes)


def resources_of(recipe: Recipe, needed_bytes: int) -> tuple[dict[str, Any], dict[str, float], int, int]:
    """Return a trial's ``scaling``, its process's Ray resources, the host memory that it reserves itself, and threads.

    On GPUs a trial takes whole devices, except where nodes advertise ``gpu_memory_mib``: then the largest even share
    of a device that holds it.
    """
    scaling = recipe.scaling.model_dump(mode="json")
    if nested(recipe):
        resources = worker_resources(recipe.scaling)
        if not recipe.scaling.use_gpu:
            resources["memory"] = float(needed_bytes + RUNTIME_BYTES)
        # The trial itself only waits, for workers that have a placement group of their own: with a share of a core it
        # would leave too little for those that want all cores of a node.
        return scaling | {"resources_per_worker": resources}, {"memory": float(RUNTIME_BYTES)}, 0, 0
    resources = _of_process(recipe)
    scaling |= {"num_workers": 0, "resources_per_worker": None}
    if recipe.scaling.use_gpu:
        resources = {"GPU": 1.0, **resources}
        if (per_gpu := _advertised_gpu_mib()) and resources["GPU"] == 1.0:
            share = max(1, per_gpu // max(1, -(-needed_bytes >> 20)))
            # Rounded down: Ray counts in ten-thousandths, and six times 0.1667 is more than a GPU.
            resources |= {"GPU": math.floor(1e4 / share) / 1e4, "gpu_memory_mib": per_gpu // share}
        return scaling, resources, RUNTIME_BYTES, max(1, int(resources["CPU"]))
    return scaling, resources, needed_bytes + RUNTIME_BYTES, max(1, int(resources["CPU"]))


def _advertised_gpu_mib() -> int:
    """Return the least memory of one GPU that the nodes advertise; 0 if any node has GPUs but does not say."""
    with_gpus = [node["Resources"] for node in _nodes() if node["Resources"].get("GPU")]
    return int(min((node.get("gpu_memory_mib", 0) / node["GPU"] for node in with_gpus), default=0))


def most_at_once(recipe: Recipe, admitted_bytes: int) -> int | None:
    """Count the trials whose workers fit beside each other; None where their processes' own resources see to it.

    A trial with workers waits for them holding no core, so without a limit all of them could wait for one another.

    Args:
        admitted_bytes: what a worker may need at most.

    Raises:
        BudgetError: not one fits.
    """
    if not nested(recipe):
        return None
    resources = _of_worker(recipe, admitted_bytes)
    room, least = _that_fit(resources), _least_workers(recipe)
    if room < least:
        raise BudgetError(
            f"scaling: {least} workers with {resources} each do not fit on this cluster, which has room for {room}; "
            "lower scaling.num_workers or scaling.resources_per_worker"
        )
    return room // least


def _most_of_workers(recipe: Recipe) -> int:
    """Return the memory on CPU that each worker of a trial may need so that all of them fit; 0 or less if none may."""
    least, beside = _least_workers(recipe), _of_worker(recipe, 0)
    del beside["memory"]
    shares = {int(node["Resources"].get("memory", 0)) // count for node in _nodes() for count in range(1, least + 1)}
    fitting = [share for share in shares if _that_fit({**beside, "memory": share}) >= least]
    if not fitting:
        most_at_once(recipe, 0)  # says what is missing besides memory
    return max(fitting, default=0) - math.ceil(_of_worker(recipe, 0)["memory"])


def _of_process(recipe: Recipe) -> dict[str, float]:
    """Return the resources, besides memory and GPUs, of a trial without workers; the recipe may say otherwise."""
    return {"CPU": 1.0, **(recipe.scaling.resources_per_worker or {})}


def _of_worker(recipe: Recipe, needed_bytes: int) -> dict[str, float]:
    """Return the resources of a trial's worker, with its share of the process that waits for it."""
    resources = dict(resources_of(recipe, needed_bytes)[0]["resources_per_worker"])
    if "memory" in resources:
        resources["memory"] += RUNTIME_BYTES / _least_workers(recipe)
    return resources


def _least_workers(recipe: Recipe) -> int:
    workers = recipe.scaling.num_workers
    return workers[0] if isinstance(workers, tuple) else max(1, workers)


def _that_fit(resources: Mapping[str, float]) -> int:
    """Count the workers or processes with these resources that fit on the cluster, each on one node."""
    return sum(
        min(int(node["Resources"].get(kind, 0.0) // amount) for kind, amount in resources.items() if amount)
        for node in _nodes()
    )


def _holds(has: Mapping[str, float], resources: Mapping[str, float]) -> bool:
    return all(has.get(kind, 0.0) >= amount for kind, amount in resources.items())


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]

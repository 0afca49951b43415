"""What a trial of a sweep takes from the cluster, and how many fit at a time."""

from __future__ import annotations

from typing import Any

from raymem.cluster.connection import worker_resources
from raymem.cluster.trainer import Status
from raymem.errors import BudgetError
from raymem.memory.budget import bytes_text
from raymem.training.recipe import Recipe

RUNTIME_BYTES = 1 << 30
"""Host memory of a trial's process besides its tensors: Python, Ray and torch."""


def nested(recipe: Recipe) -> bool:
    """Whether a trial has worker processes of its own; else it trains in the trial's."""
    return recipe.scaling.num_workers not in (0, 1) or recipe.scaling.strategy == "fsdp2"


def admitted_bytes(recipe: Recipe, budget_bytes: int, status: Status) -> int:
    """The budget, or on CPU what a node has for one trial, if that is less."""
    if recipe.scaling.use_gpu:
        return budget_bytes
    import ray

    most = max(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]) - RUNTIME_BYTES
    if most <= 0:
        raise BudgetError(
            f"no node has more than the {bytes_text(RUNTIME_BYTES)} of memory that a trial's process takes"
        )
    if most < budget_bytes:
        status(f"warning: the budget is more than a node has; trials may take {bytes_text(most)}")
    return min(most, budget_bytes)


def resources_of(recipe: Recipe, needed_bytes: int) -> tuple[dict[str, Any], dict[str, float], int, int]:
    """``scaling`` of a trial, the Ray resources of its process, host memory that it reserves itself, and its threads.

    On GPUs a trial takes whole devices, except where nodes advertise ``gpu_memory_mib``: then the largest even share
    of a device that holds it.
    """
    scaling = recipe.scaling.model_dump(mode="json")
    if nested(recipe):
        wanted = worker_resources(recipe)
        if not recipe.scaling.use_gpu:
            wanted["memory"] = float(needed_bytes + RUNTIME_BYTES)
        # The trial itself only waits; its workers have a placement group of their own.
        return scaling | {"resources_per_worker": wanted}, {"CPU": 0.01}, 0, 0
    wanted = dict(recipe.scaling.resources_per_worker or {"CPU": 1.0})
    scaling |= {"num_workers": 0, "resources_per_worker": None}
    if recipe.scaling.use_gpu:
        wanted = {"CPU": 1.0, "GPU": 1.0, **wanted}
        if (per_gpu := _advertised_gpu_mib()) and wanted["GPU"] == 1.0:
            share = max(1, per_gpu // max(1, -(-needed_bytes >> 20)))
            wanted |= {"GPU": round(1 / share, 4), "gpu_memory_mib": per_gpu // share}
        return scaling, wanted, RUNTIME_BYTES, max(1, int(wanted["CPU"]))
    return scaling, wanted, needed_bytes + RUNTIME_BYTES, max(1, int(wanted["CPU"]))


def _advertised_gpu_mib() -> int:
    """Memory of one GPU as the nodes advertise it, the least of all nodes; 0 if any has GPUs but does not say."""
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    return int(min((node.get("gpu_memory_mib", 0) / node["GPU"] for node in found), default=0))


def most_at_once(recipe: Recipe) -> int | None:
    """Trials whose workers fit beside each other; None where their processes' own resources see to it.

    A trial with workers waits for them holding nothing, so without a limit all of them could wait for one another.
    """
    if not nested(recipe):
        return None
    import ray

    wanted = {k: v for k, v in resources_of(recipe, 0)[0]["resources_per_worker"].items() if v and k != "memory"}
    workers = recipe.scaling.num_workers
    least = workers[0] if isinstance(workers, tuple) else max(1, workers)
    places = sum(
        min(int((node["Resources"].get(kind, 0.0) - (0.01 if kind == "CPU" else 0)) // amount) for kind, amount in
            wanted.items())
        for node in ray.nodes() if node["Alive"]
    )  # fmt: skip
    if places < least:
        raise BudgetError(
            f"scaling: {least} workers with {wanted} each do not fit on this cluster beside the trial that waits for "
            "them; lower scaling.num_workers or scaling.resources_per_worker"
        )
    return places // least

"""Says what a group of workers waits for, by what Ray itself knows: its actors, its free resources, its autoscaler."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group_table

from raymem.cluster.connection import worker_resources
from raymem.memory.budget import bytes_text
from raymem.private_apis import ray_actors, ray_constants, ray_internal_kv_get
from raymem.recipe.schema import ScalingSection
from raymem.text import cut

_PREPARED = ("working_dir", "py_modules", "pip", "uv", "conda", "container", "image_uri")
"""The parts of a runtime environment that a node fetches or installs before a worker starts."""


@dataclass(frozen=True)
class Waiting:
    """What the workers of a run wait for.

    Args:
        each: Ray resources of one worker.
        environment: parts of the job's runtime environment that nodes prepare first.
    """

    each: Mapping[str, float]
    environment: tuple[str, ...] = ()

    @staticmethod
    def of(scaling: ScalingSection) -> Waiting:
        """Return what this driver's workers will wait for."""
        environment = ray.get_runtime_context().runtime_env
        return Waiting(worker_resources(scaling), tuple(part for part in _PREPARED if environment.get(part)))

    def words(self, num_workers: int) -> str:
        """Ask Ray, and say what a group that was asked for waits for now."""
        job = ray.get_runtime_context().get_job_id()
        states = [
            actor["State"]
            for actor in ray_actors(job_id=ray.JobID.from_hex(job)).values()
            if "RayTrainWorker" in actor["ActorClassName"] and actor["State"] != "DEAD"
        ]
        wanted = sorted([dict(self.each)] * num_workers, key=str)
        groups = placement_group_table().values()
        if not states and any(
            group["state"] in ("PENDING", "RESCHEDULING") and sorted(group["bundles"].values(), key=str) == wanted
            for group in groups
        ):
            return self.without_room(num_workers, ray.available_resources(), autoscaler_words())
        return self.starting(num_workers, states.count("ALIVE"))

    def without_room(self, num_workers: int, free: Mapping[str, float], autoscaler: str) -> str:
        """Word the wait for resources.

        Args:
            free: in the whole cluster, by kind.
            autoscaler: what that does about it; empty if there is none.
        """
        each = ", ".join(_amount(kind, amount) for kind, amount in self.each.items())
        has = ", ".join(_amount(kind, free.get(kind, 0.0)) for kind in self.each)
        return f"waiting for workers ({num_workers} x {each}: the cluster has {has} free{autoscaler})"

    def starting(self, num_workers: int, up: int) -> str:
        """Word the wait for processes that have got their resources."""
        if up >= num_workers:
            return "connecting the workers" if num_workers > 1 else "preparing the worker"
        first = f", after their nodes have prepared {' and '.join(self.environment)}" if self.environment else ""
        return f"starting workers ({up} of {num_workers} up{first})"


def _amount(kind: str, amount: float) -> str:
    if kind in ("memory", "object_store_memory"):
        return f"{bytes_text(int(amount))} {kind}"
    return f"{amount:g} {kind}"


def autoscaler_words() -> str:
    """Say what the cluster's autoscaler is doing; empty without one, or while it does nothing."""
    report = ray_internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    if report is not None:  # the older one writes it there
        return words_of(json.loads(report).get("autoscaler_report") or {})
    try:
        from ray.autoscaler.v2.sdk import get_cluster_status

        status: Any = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:  # no autoscaler, or one that does not say: `ray status` would not know either
        return ""
    return scaled(
        sum(launch.count for launch in status.pending_launches) + len(status.pending_nodes),
        [str(launch.details or launch.instance_type_name) for launch in status.failed_launches],
    )


def words_of(report: Mapping[str, Any]) -> str:
    """Read the report of the older autoscaler, an ``AutoscalerSummary`` in JSON."""
    coming = sum(report.get("pending_launches", {}).values()) + len(report.get("pending_nodes", []))
    failures = report.get("node_availability_summary", {}).get("node_availabilities", {}).values()
    causes = [failure["unavailable_node_information"] or {} for failure in failures if not failure["is_available"]]
    return scaled(coming, [str(cause.get("description") or "no capacity") for cause in causes])


def scaled(coming: int, failed: list[str]) -> str:
    """Word what an autoscaler does.

    Args:
        coming: nodes that are being started.
        failed: the reasons of starts that failed.
    """
    words = f"; its autoscaler is starting {coming} node{'s' * (coming > 1)}" if coming else ""
    if failed:
        words += f"; a node could not be started: {cut(' '.join(failed[-1].split()), 120)}"
    return words

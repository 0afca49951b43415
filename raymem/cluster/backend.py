"""Does the work of a run on Ray, as :class:`raymem.runs.backend.Backend`, on a given cluster or one of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from raymem.recipe.schema import ScalingSection
from raymem.storage.storage import Storage
from raymem.training.job import GroupTask, PreparedRun, StepJob
from raymem.training.loop import Outcome
from raymem.training.reporter import Audience, Status, unheard

if TYPE_CHECKING:
    from raymem.cluster.tasks import Task

Item = TypeVar("Item")
Value = TypeVar("Value")


class RayBackend:
    """A Ray cluster, which :meth:`connect` joins or starts.

    Args:
        scaling: how many workers a training has, whether they share the model, and what each one gets.
    """

    def __init__(self, scaling: ScalingSection) -> None:
        self.scaling = scaling
        self._connected = False
        self._status: Status = unheard

    def connect(self, storage: Storage | None, status: Callable[[str], None]) -> None:
        """Join or start the cluster, and prove that all of its nodes see the storage."""
        self._status = status
        if self._connected:
            return
        from raymem.cluster import connection
        from raymem.cluster.doctor import checks

        status("starting Ray")
        connection.connect(self.scaling)
        if storage is not None:
            checks.check_storage_shared(storage.path)
        self._connected = True

    def map(self, function: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
        """Run one task per item."""
        from raymem.cluster.tasks import ray_map

        return ray_map(function, items, self._status)

    def group(self, function: GroupTask[Value], config: dict[str, Any], status: Status = unheard) -> Value:
        """Run Ray Train workers that share the model, or one task with a worker's resources."""
        if self.scaling.shares_model:
            from raymem.cluster.train.group import call_on_workers

            return call_on_workers(function, config, self.scaling, status)
        from raymem.cluster.tasks import call_as_worker

        return call_as_worker(function, config, self.scaling)

    def start(self, function: GroupTask[Value], config: dict[str, Any]) -> Task[Value]:
        """Start a task with a worker's resources; it waits for them."""
        from raymem.cluster.tasks import start_as_worker

        return start_as_worker(function, config, self.scaling)

    def train(self, prepared: PreparedRun, audience: Audience) -> Outcome:
        """Train with Ray Train workers."""
        from raymem.cluster.train.controller import train_workers

        return train_workers(prepared, audience)

    def run_steps(self, job: StepJob, progress: Callable[[int, int], None]) -> None:
        """Run one task per step."""
        from raymem.cluster.step_jobs import run_by_tasks

        run_by_tasks(job, progress)

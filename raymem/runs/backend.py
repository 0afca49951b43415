"""Does the work of a run in this process; :class:`raymem.cluster.backend.RayBackend` does it on Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from raymem.recipe.schema import ScalingSection
from raymem.storage.storage import Storage
from raymem.training.dist_env import DistEnv
from raymem.training.job import GroupTask, PreparedRun, StepJob
from raymem.training.loop import Outcome, run
from raymem.training.reporter import Audience, LocalReporter, Status, unheard

Item = TypeVar("Item")
Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)

Progress = Callable[[int, int], None]
"""A function that is told how many of how many steps are done."""


_HERE = ScalingSection(num_workers=0)


class Started(Protocol[Value_co]):
    """A call that was begun."""

    def is_done(self) -> bool:
        """Say whether its value is there, or its error."""

    def result(self) -> Value_co:
        """Wait for its value.

        Raises:
            RaymemError: what the function raised for the user.
            ClusterError: its process died.
        """

    def cancel(self) -> None:
        """End it without a value."""


class Backend(Protocol):
    """The four kinds of work that a run consists of. Functions and their arguments are plain data."""

    def connect(self, storage: Storage | None, status: Status) -> None:
        """Be ready for work, and make sure that whoever does it sees the storage; a second call does nothing.

        Args:
            storage: None for work that needs none.

        Raises:
            ClusterError: it cannot be reached, or will never have what the recipe asks for.
            StorageError: a node sees another storage.
        """

    def map(self, function: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
        """Return the function's values, in order; a call may be repeated."""

    def group(self, function: GroupTask[Value], config: dict[str, Any], status: Status = unheard) -> Value:
        """Call a function once per worker that holds the model: on each rank where workers share it
        (``scaling.strategy: fsdp2``), else with the resources of one worker.

        Args:
            status: told what a group of workers waits for and does.

        Returns:
            What rank 0 returned.

        Raises:
            RaymemError: what the function raised for the user.
            ClusterError: workers died again and again, or never started.
        """

    def start(self, function: GroupTask[Value], config: dict[str, Any]) -> Started[Value]:
        """Begin a call with the resources of one worker, and do not wait for it."""

    def train(self, prepared: PreparedRun, audience: Audience) -> Outcome:
        """Train to the end; every row of metrics goes to the audience, in this process."""

    def run_steps(self, job: StepJob, progress: Progress) -> None:
        """Do the steps of a job that are not done yet, and commit it."""


class LocalBackend:
    """Works in this process, without Ray.

    Args:
        scaling: says on which device.
    """

    def __init__(self, scaling: ScalingSection = _HERE) -> None:
        self.scaling = scaling

    def connect(self, storage: Storage | None, status: Status) -> None:
        """Do nothing: this process is ready."""

    def map(self, function: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
        """Make one call after the other."""
        return [function(item) for item in items]

    def group(self, function: GroupTask[Value], config: dict[str, Any], status: Status = unheard) -> Value:
        """Make one call, of which a status would tell nothing that people wait for."""
        return function(config, DistEnv.of(self.scaling), LocalReporter().progress)

    def start(self, function: GroupTask[Value], config: dict[str, Any]) -> Started[Value]:
        """Refuse: nothing runs beside this process, and no recipe asks for it."""
        raise NotImplementedError("work beside a training needs Ray: scaling.num_workers is 0")

    def train(self, prepared: PreparedRun, audience: Audience) -> Outcome:
        """Run the loop."""
        reporter = LocalReporter(*audience.rows, new_rows=audience.new_rows, status=audience.status)
        dist_env = DistEnv.current(prepared.recipe)
        return run(
            prepared.recipe, dist_env, prepared.run, prepared.train_data, prepared.eval_data, reporter,
            predicted_peak_bytes=prepared.predicted_peak_bytes,
        )  # fmt: skip

    def run_steps(self, job: StepJob, progress: Progress) -> None:
        """Do step after step."""
        if job.is_committed():
            return
        steps = job.steps()
        for number, step in enumerate(steps, start=1):
            if not job.is_done(step):
                job.run(step)
                progress(number, len(steps))
        job.commit()


def backend_of(scaling: ScalingSection) -> Backend:
    """Return the backend that ``scaling`` asks for."""
    if scaling.num_workers == 0:
        return LocalBackend(scaling)
    from raymem.cluster.backend import RayBackend

    return RayBackend(scaling)

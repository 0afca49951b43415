"""Brings progress from workers to users by paced reports, a callback in the controller, and a polled mailbox."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymem.cluster.connection import HeadCheck
from raymem.cluster.train.failures import first_rank
from raymem.cluster.train.pulse import Beat, Pulse
from raymem.errors import RaymemError
from raymem.recipe.axes import register_again
from raymem.tracking import Tracker, attach_tracker
from raymem.training.dist_env import DistEnv
from raymem.training.reporter import Listener, Row

REPORT_EVERY_S = 5.0
"""Seconds between reports, far above the controller's poll: ``ray.train.report`` waits until it took the last one."""


@ray.remote(num_cpus=0)
class MetricsMailbox:
    """A small actor on the driver's node: metric rows, beats, failures, and the error that ends a run for good."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._dropped = 0
        self._error: RaymemError | None = None
        self._beats: dict[int, Beat] = {}
        self._failures: list[int] = []

    def push(self, rows: Sequence[Row]) -> None:
        self._rows += rows

    def rows(self, received: int) -> list[Row]:
        """Return the rows behind the first ``received`` ones, which the driver has and are dropped here."""
        del self._rows[: received - self._dropped]
        self._dropped = received
        return self._rows

    def fail(self, error: RaymemError) -> None:
        """Remember the user's error: Ray would retry it like a crash, and it would only come again."""
        self._error = self._error or error

    def error(self) -> RaymemError | None:
        return self._error

    def beat(self, beat: Beat, done: bool) -> None:
        """Take what a rank says of itself; of one that is done nothing more is expected."""
        self._beats[beat.rank] = beat
        if done:
            del self._beats[beat.rank]

    def beats(self) -> dict[int, Beat]:
        return self._beats

    def failed(self, rank: int) -> None:
        """Count a failure of the group, which began with ``rank`` and ends all of its processes."""
        self._failures.append(rank)
        self._beats = {}

    def failures(self) -> list[int]:
        return self._failures


def new_mailbox() -> Any:
    """Return a mailbox on the driver's own node, which must outlive every other one."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return MetricsMailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class ReportCallback(ray.train.UserCallback):  # type: ignore[misc]
    """Hands each report to the tracker and to the mailbox, in the Ray Train controller.

    Args:
        tracking: kind of the tracker, the plain data that rebuild it, and kinds that are not raymem's own.
    """

    def __init__(self, tracking: tuple[str, Mapping[str, Any], Mapping[str, Mapping[str, str]]], mailbox: Any) -> None:
        self._tracking = tracking
        self._mailbox = mailbox
        self._tracker: Tracker | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        rows = metrics[0].get("rows", [])
        if self._tracker is None:
            kind, spec, outside = self._tracking
            register_again(outside)
            self._tracker = attach_tracker(kind, spec)
        # Waited for, so that a mailbox that has died ends the run: rows would be lost without a word.
        ray.get(self._mailbox.push.remote(rows))
        self._tracker.log(rows)

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        self._mailbox.failed.remote(first_rank(worker_exceptions))


class RayReporter:
    """Sends rows through ``ray.train.report``, often enough to watch and seldom enough to cost nothing.

    All ranks must report equally often, so rank 0 fixes the step of the next report from the pace of the last ones
    and tells the others.
    """

    def __init__(self, dist_env: DistEnv, pulse: Pulse) -> None:
        self._dist_env = dist_env
        self._pulse = pulse
        self._rows: list[Row] = []
        self._next_step = 0.0
        self._last_report = (0.0, time.monotonic())

    def log(self, row: Row) -> None:
        self._rows.append(row)
        if row["step"] >= self._next_step:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        step = self._rows[-1]["step"]
        self._pulse.report()
        ray.train.report({"rows": self._rows if self._dist_env.is_main else []})
        self._rows = []
        last_step, last_time = self._last_report
        seconds_per_step = (time.monotonic() - last_time) / max(1.0, step - last_step)
        ahead = torch.tensor(max(1.0, REPORT_EVERY_S // max(seconds_per_step, 1e-6)))
        if dist.is_initialized():
            dist.broadcast(ahead, src=0)
        self._next_step = step + float(ahead)
        self._last_report = (step, time.monotonic())

    def progress(self, what: str, *, brief: bool = True) -> None:
        self._pulse.progress(what, brief)


class MetricsPoller:
    """Reads the mailbox in a thread while the driver waits for the run."""

    def __init__(self, mailbox: Any, listeners: Sequence[Listener]) -> None:
        self._mailbox = mailbox
        self._listeners = listeners
        self._received = 0
        self._head = HeadCheck(ray.get_runtime_context().gcs_address)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MetricsPoller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._deliver()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self._deliver()
            self._head.look()

    def _deliver(self) -> None:
        try:
            rows = ray.get(self._mailbox.rows.remote(self._received), timeout=10)
        except ray.exceptions.RayError:
            return  # the cluster is going away; the run itself will say so
        self._received += len(rows)
        for listener in self._listeners if rows else ():
            listener(rows)

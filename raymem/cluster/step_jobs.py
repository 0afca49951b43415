"""Runs a job in steps as Ray tasks: one per step, as many at once as the steps' order, cores and memory allow.

A task gets plain values and reads and writes files itself; nothing passes through the object store, where it could be
lost with a node. A step that was done is skipped, so a killed worker costs one step and a killed driver nothing.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from raymem.errors import ClusterError, RaymemError
from raymem.training.job import StepJob

LIBRARIES_BYTES = 600 << 20
"""The memory of a worker before it reads anything: torch and transformers."""
MAX_RETRIES = 3
_LOOK_EVERY_S = 15.0

log = logging.getLogger(__name__)


def run_by_tasks(job: StepJob, progress: Callable[[int, int], None]) -> None:
    """Do the missing steps of a job on the connected cluster, and commit it.

    Args:
        progress: told how many of how many steps are done.

    Raises:
        RaymemError: what a step raised for the user.
        ClusterError: a step's worker died again and again.
    """
    if job.is_committed():
        return
    everything = job.steps()
    left = _Left([step for step in everything if not job.is_done(step)])
    running: dict[Any, Any] = {}
    nodes = _Nodes(job.what)
    remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, retry_exceptions=[OSError])(run_task)
    try:
        while left.count:
            nodes.look()
            for step in left.take(nodes.window - len(running)):
                # Never more than the largest node has: it would wait for ever. There it then runs alone.
                needed = min(job.memory_bytes(step) + LIBRARIES_BYTES, nodes.most_memory)
                running[remote.options(memory=needed).remote(job, step)] = step
            done, _ = ray.wait(list(running), timeout=_LOOK_EVERY_S)
            if not done:
                continue
            (reference,) = done
            step = running.pop(reference)
            _result(reference, f"step {step.name} of {job.what}")
            left.done(step)
            progress(len(everything) - left.count, len(everything))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    job.commit()


class _Left:
    """The steps that are left, given out in their order as soon as those before them are done.

    Each step is looked at once, and once more for each that it waits for: thousands cost a driver nothing.
    """

    def __init__(self, steps: Sequence[Any]) -> None:
        self.count = len(steps)
        names = {step.name for step in steps}
        self._steps = steps
        self._before = [names.intersection(step.after) for step in steps]
        self._behind: dict[str, list[int]] = {}
        for number, before in enumerate(self._before):
            for name in before:
                self._behind.setdefault(name, []).append(number)
        self._ready = [number for number, before in enumerate(self._before) if not before]  # sorted, and so a heap

    def take(self, most: int) -> list[Any]:
        """Give out up to so many steps that can be done now."""
        return [self._steps[heapq.heappop(self._ready)] for _ in range(min(most, len(self._ready)))]

    def done(self, step: Any) -> None:
        """Note that a step is done."""
        self.count -= 1
        for number in self._behind.pop(step.name, ()):
            self._before[number].discard(step.name)
            if not self._before[number]:
                heapq.heappush(self._ready, number)


def run_task(job: StepJob, step: Any) -> None:
    """Do one step, on a node."""
    job.run(step)


class _Nodes:
    """Looks at the cluster now and then: one with an autoscaler may begin with no node that takes work.

    Args:
        what: the job, for people.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._looked = float("-inf")
        self._warned = False
        self.window, self.most_memory = 2, 0
        """Tasks in flight, two per core so that none waits for the driver; and the memory of the largest node."""

    def look(self) -> None:
        """Look again, if the last look is a while ago."""
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = sum(int(node.get("CPU", 0)) for node in nodes)
        self.window = max(2, 2 * cores)
        self.most_memory = int(max((node.get("memory", 0) for node in nodes), default=0))
        if not cores and not self._warned:
            self._warned = True
            log.warning(
                "%s waits: no node of the cluster has CPU cores for its tasks; start one (ray start --address=...), or "
                "wait for the autoscaler", self._what,
            )  # fmt: skip


def _result(reference: Any, what: str) -> None:
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaymemError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        text = " ".join(str(error).split())[:200]
        raise ClusterError(
            f"{what} was lost {1 + MAX_RETRIES} times ({text}); the steps that are done are kept: run the same command "
            "again, on nodes with more memory if it ran out"
        ) from error

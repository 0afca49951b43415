"""Brings metrics from workers to Ray Train's controller by paced reports."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from raymem import stopping
from raymem.cluster.train.pulse import Pulse
from raymem.training.dist_env import DistEnv
from raymem.training.reporter import Row, Wanted

REPORT_EVERY_S = 5.0
"""Seconds between reports, far above the controller's poll: ``ray.train.report`` waits until it took the last one."""


class WorkerEnded(RuntimeError):
    """Ends a worker whose process was asked to end: for Ray a failure, from which the group goes on."""


class RayReporter:
    """Sends rows through ``ray.train.report``, often enough to watch and seldom enough to cost nothing.

    All ranks must report equally often, so rank 0 fixes the step of the next report from the pace of the last ones
    and tells the others.
    """

    def __init__(self, dist_env: DistEnv, pulse: Pulse, mailbox: Any = None) -> None:
        self._dist_env = dist_env
        self._pulse = pulse
        self._mailbox = mailbox
        self._wanted = Wanted.NOTHING
        self._request = self._answering = self._answered = 0
        """Requests for a checkpoint, by number: the last that is known, that the next one answers, that is answered."""
        self._rows: list[Row] = []
        self._replayed = 0
        self._next_step = 0.0
        self._last_report = (0.0, time.monotonic())

    def log(self, row: Row) -> None:
        self._rows.append(row)
        if row["step"] >= self._next_step:
            self.flush()

    def replay(self, rows: Sequence[Row]) -> None:
        self._rows += rows
        self._replayed += len(rows)

    def flush(self) -> None:
        if not self._rows:
            return
        step = self._rows[-1]["step"]
        self._pulse.report()
        is_main = self._dist_env.is_main
        ray.train.report({"rows": self._rows if is_main else [], "replayed": self._replayed if is_main else 0})
        self._rows, self._replayed = [], 0
        last_step, last_time = self._last_report
        seconds_per_step = (time.monotonic() - last_time) / max(1.0, step - last_step)
        ahead = max(1.0, REPORT_EVERY_S // max(seconds_per_step, 1e-6))
        # Whatever one of the ranks knows, all know from here on; the pace is that of rank 0.
        stops, request = self._wishes()
        known = torch.tensor([ahead if is_main else 0.0, float(stops), float(stopping.asked()), float(request)])
        if dist.is_initialized():
            dist.all_reduce(known, dist.ReduceOp.MAX)
        ahead, stops, is_ending, request = known.tolist()
        self._request = max(self._request, int(request))
        is_preempted = _is_preempted()
        self._wanted = Wanted.STOP if stops else Wanted.SAVE if is_ending or is_preempted else Wanted.NOTHING
        # Of a node that goes nobody knows when exactly: until then every step is saved.
        self._next_step = step + (1.0 if is_preempted else ahead)
        self._last_report = (step, time.monotonic())

    def _wishes(self) -> tuple[bool, int]:
        """Ask, on rank 0, whether the run is to end, and for the last request for a checkpoint."""
        if not self._dist_env.is_main or self._mailbox is None:
            return False, 0
        stops, request = ray.get(self._mailbox.wishes.remote())
        return stops, request

    def wanted(self) -> Wanted:
        """See :class:`raymem.training.reporter.Reporter`; each answer is given once."""
        wanted, self._wanted = self._wanted, Wanted.NOTHING
        if wanted is Wanted.NOTHING and self._request > self._answered:
            wanted = Wanted.SAVE
        self._answering = self._request
        return wanted

    def saved(self, step: int) -> None:
        """Answer requests, and end this worker if its process was asked to end; the group starts again without it."""
        if self._answering > self._answered:
            self._answered = self._answering
            if self._dist_env.is_main:
                ray.get(self._mailbox.saved.remote(step, self._answered))
        if stopping.asked():
            raise WorkerEnded("its process got SIGTERM, and every step is saved")

    def progress(self, what: str, *, brief: bool = True, told: bool = False) -> None:
        self._pulse.progress(what, brief, told)


def paced_reporter() -> RayReporter:
    """Return the reporter of raymem's own loop, for the worker of somebody else's.

    ``ray.train.report`` waits until the controller has looked, which it does every two seconds: called after each
    step, it makes each step that long. ``log({"step": 1, "loss": 2.3})`` keeps rows and reports them together, some
    seconds apart and on all ranks at the same step, as ``{"rows": [...]}``; ``flush()`` sends the rest, at the end.
    All ranks call both equally often, with the same steps; values are numbers. On GPUs the ranks need both backends:
    ``TorchConfig(backend="cpu:gloo,cuda:nccl")``.
    """
    context = ray.train.get_context()
    dist_env = DistEnv(rank=context.get_world_rank(), world_size=context.get_world_size())
    return RayReporter(dist_env, Pulse(None, dist_env.rank, None))


def _is_preempted() -> bool:
    """Say whether Ray was told that the node goes. Its lowest releases pass that on to nobody; SIGTERM arrives."""
    ask = getattr(ray.train, "get_preemption_info", None)
    return ask is not None and ask() is not None

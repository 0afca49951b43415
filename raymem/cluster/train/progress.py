"""Brings metrics from workers to Ray Train's controller by paced reports."""

from __future__ import annotations

import time
from collections.abc import Sequence

import ray.train
import torch
import torch.distributed as dist

from raymem.cluster.train.pulse import Pulse
from raymem.training.dist_env import DistEnv
from raymem.training.reporter import Row

REPORT_EVERY_S = 5.0
"""Seconds between reports, far above the controller's poll: ``ray.train.report`` waits until it took the last one."""


class RayReporter:
    """Sends rows through ``ray.train.report``, often enough to watch and seldom enough to cost nothing.

    All ranks must report equally often, so rank 0 fixes the step of the next report from the pace of the last ones
    and tells the others.
    """

    def __init__(self, dist_env: DistEnv, pulse: Pulse) -> None:
        self._dist_env = dist_env
        self._pulse = pulse
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
        ahead = torch.tensor(max(1.0, REPORT_EVERY_S // max(seconds_per_step, 1e-6)))
        if dist.is_initialized():
            dist.broadcast(ahead, src=0)
        self._next_step = step + float(ahead)
        self._last_report = (step, time.monotonic())

    def progress(self, what: str, *, brief: bool = True, told: bool = False) -> None:
        self._pulse.progress(what, brief, told)

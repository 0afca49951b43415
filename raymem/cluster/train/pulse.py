"""Tells the driver from a worker's own thread, every few seconds, how far the worker is."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import Any

import ray
import torch.distributed as dist

from raymem.cluster.train.events import Told
from raymem.cluster.train.watchdog import started_at

_BEAT_EVERY_S = 5.0
_STACK_LINES = 40


@dataclass(frozen=True)
class Beat:
    """How far one rank is; plain values for the way between processes."""

    rank: int
    node_id: str
    node: str
    """The node's address, for people."""
    pid: int
    started: str
    """When the process began, see :func:`started_at`: ids of processes are used again."""
    number: int
    """Beats sent; it stands still when the whole process does."""
    what: str
    brief: bool
    """See :meth:`raymem.training.reporter.Reporter.progress`, as for ``what``."""
    progress: int
    """Grows whenever the rank gets further."""
    meetings: int
    """How many collectives and reports the rank has entered: the one that the others wait for has the fewest."""
    stack: str
    """Of the training thread, if it got no further since the last beat."""


class Pulse:
    """What a worker's training thread says of itself, and the thread that sends it.

    Args:
        mailbox: where beats go; without one nothing is sent.
        rank: of the worker.
        timeout_s: ``scaling.hang_timeout``; None sends no beats.
    """

    def __init__(self, mailbox: Any, rank: int, timeout_s: float | None) -> None:
        self._mailbox, self._rank = mailbox, rank
        self._every_s = None if mailbox is None or timeout_s is None else min(_BEAT_EVERY_S, timeout_s / 4)
        self._what, self._brief = "its start", False
        self._progress = self._reports = self._number = 0
        self._stop = threading.Event()
        self._training_thread = threading.get_ident()

    def __enter__(self) -> Pulse:
        if self._every_s is not None:
            context = ray.get_runtime_context()
            self._who = {
                "rank": self._rank,
                "node_id": context.get_node_id(),
                "node": ray.util.get_node_ip_address(),
                "pid": os.getpid(),
                "started": started_at(os.getpid()),
            }
            self._thread = threading.Thread(target=self._send, args=(self._every_s,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the beats; the last one says so, and the rank is no longer watched."""
        if self._every_s is not None:
            self._stop.set()
            self._thread.join()

    def progress(self, what: str, brief: bool, told: bool) -> None:
        self._what, self._brief = what, brief
        self._progress += 1
        if told and self._mailbox is not None:
            self._mailbox.push.remote(Told(self._rank, what))

    def report(self) -> None:
        """Count a report, where Ray Train makes the ranks wait for each other."""
        self._reports += 1

    def _send(self, every_s: float) -> None:
        sent = -1
        while True:
            done = self._stop.wait(every_s) if self._number else False
            self._number += 1
            progress = self._progress
            beat = Beat(
                **self._who, number=self._number, what=self._what, brief=self._brief, progress=progress,
                meetings=self._reports + _collectives(),
                stack=_stack(self._training_thread) if progress == sent else "",
            )  # fmt: skip
            sent = progress
            with contextlib.suppress(ray.exceptions.RayError):  # the driver has gone, and so will this process
                self._mailbox.beat.remote(beat, done)
            if done:
                return


def _collectives() -> int:
    """Return how many collectives this rank has entered, in the order in which all ranks enter them; 0 if unknown."""
    try:
        group = dist.distributed_c10d._get_default_group()
        backends = {id(backend): backend for backend in map(group._get_backend, group._device_types)}
        return sum(backend._get_sequence_number_for_group() for backend in backends.values())  # type: ignore[attr-defined]
    except (RuntimeError, ValueError):  # a backend that does not count, or a group that is ending
        return 0


def _stack(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    return "" if frame is None else "".join(traceback.format_stack(frame)[-_STACK_LINES:])

"""Finds the rank of a worker group that hangs, says where, and kills it so that Ray Train restarts the group.

A rank hangs when it has not got further for ``scaling.hang_timeout`` in a step or in a batch of an evaluation, or when
its process sends nothing at all for that long. The first step of a session, checkpoints and the export take as long as
they take. The ranks that wait for the one that hangs get no further either: it is the one that has entered the fewest
collectives.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:  # the process that ends another one need not load torch
    from raymem.cluster.train.pulse import Beat

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT_S = 1800.0
_KILL_TIMEOUT_S = 60.0
_STATES = {"T": "stopped (SIGSTOP)", "t": "stopped by a debugger", "D": "waiting for a device or file system"}


def collective_timeout_s(hang_timeout_s: float | None) -> float:
    """Return how long ranks wait for each other: much longer than the watchdog does, which knows for whom."""
    return max(COLLECTIVE_TIMEOUT_S, 3 * (hang_timeout_s or 0.0))


@dataclass
class _Standstill:
    """For how long a rank has sent nothing, and has got no further, by the driver's own clock."""

    beat: Beat
    silent_s: float = 0.0
    idle_s: float = 0.0


class Watchdog:
    """Judges the last beats of all ranks.

    Args:
        timeout_s: ``scaling.hang_timeout``.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._ranks: dict[int, _Standstill] = {}

    def look(self, beats: Mapping[int, Beat], elapsed_s: float) -> list[Beat]:
        """Return the last beat of each rank that hangs; usually none, or one.

        Args:
            beats: the newest of each rank of the present group.
            elapsed_s: since the last look. A driver that was stopped itself must not count that time.
        """
        ranks: dict[int, _Standstill] = {}
        for rank, beat in beats.items():
            last = self._ranks.get(rank)
            if last is None or _process(last.beat) != _process(beat):
                ranks[rank] = _Standstill(beat)
                continue
            ranks[rank] = _Standstill(
                beat,
                last.silent_s + elapsed_s if beat.number == last.beat.number else 0.0,
                last.idle_s + elapsed_s if _position(beat) == _position(last.beat) else 0.0,
            )
        self._ranks = ranks
        silent = [rank.beat for rank in ranks.values() if rank.silent_s >= self.timeout_s]
        if silent or not ranks:
            return silent
        fewest = min(rank.beat.meetings for rank in ranks.values())
        last_ones = [rank for rank in ranks.values() if rank.beat.meetings == fewest]
        if all(rank.beat.brief and rank.idle_s >= self.timeout_s for rank in last_ones):
            return [rank.beat for rank in last_ones]
        return []

    def forget(self) -> None:
        self._ranks = {}


def _position(beat: Beat) -> tuple[int, int]:
    return beat.progress, beat.meetings


def _process(beat: Beat) -> tuple[str, int, str]:
    return beat.node_id, beat.pid, beat.started


class Watch:
    """Watches a worker group in a thread while the driver waits for it.

    Args:
        timeout_s: ``scaling.hang_timeout``; None watches nothing.
        start: where a group that starts again goes on, in words.
    """

    def __init__(self, mailbox: Any, timeout_s: float | None, start: str = "from the last checkpoint") -> None:
        self._start = start
        self.killed: dict[int, str] = {}
        """By process id, what was said about a process that hung."""
        self._mailbox, self._timeout_s = mailbox, timeout_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        if self._timeout_s is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._timeout_s is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._timeout_s is not None
        watchdog, every_s, last = Watchdog(self._timeout_s), min(1.0, self._timeout_s / 8), time.monotonic()
        while not self._done.wait(every_s):
            try:
                beats = ray.get(self._mailbox.beats.remote(), timeout=10)
            except ray.exceptions.RayError:
                continue  # the cluster is going away; the run itself will say so
            now = time.monotonic()
            # A driver that was stopped itself, or its node, must not take that time for the ranks' own.
            hung = watchdog.look(beats, min(now - last, 2 * every_s))
            last = now
            if hung:
                self.killed |= end_hung(hung, self._timeout_s, len(beats), self._start)
                watchdog.forget()


def end_hung(
    hung: list[Beat], timeout_s: float, num_ranks: int, start: str = "from the last checkpoint"
) -> dict[int, str]:
    """Kill the processes of ranks that hang, with a warning about each; return by process what was said."""
    said: dict[int, str] = {}
    for beat in hung:
        where = NodeAffinitySchedulingStrategy(beat.node_id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(end_process).options(scheduling_strategy=where)
        try:
            # Not by ray.kill: it needs a thread of the process that may be what hangs.
            ended = ray.get(task.remote(beat.pid, beat.started, not beat.stack), timeout=_KILL_TIMEOUT_S)
        except ray.exceptions.TaskUnschedulableError:  # its node has gone
            ended = None
        except ray.exceptions.RayError as error:
            ended = f"could not be ended by its node ({type(error).__name__})", ""
        if ended is None:  # it died meanwhile, which is Ray Train's to see
            continue
        state, stack = ended
        waiting = ", the other ranks wait for it" if len(hung) < num_ranks else ""
        said[beat.pid] = (
            f"rank {beat.rank} on node {beat.node} (process {beat.pid}) hangs: no progress for scaling.hang_timeout="
            f"{timeout_s:g} s after it began {beat.what}{waiting}, and its process {state}"
        )
        log.warning(
            "%s; the process is killed, and the group starts again %s. Its stack:\n%s",
            said[beat.pid],
            start,
            (beat.stack or stack or "  unknown: the process does not answer and py-spy could not read it").rstrip(),
        )
    return said


def started_at(pid: int) -> str:
    """Return when a process of this node began, in the kernel's own unit.

    Raises:
        OSError: there is no such process.
    """
    return _facts(pid)[19]


def _facts(pid: int) -> list[str]:
    """Return the fields of ``/proc/<pid>/stat`` behind the name, of which the first is the state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def end_process(pid: int, started: str, spy: bool) -> tuple[str, str] | None:
    """Kill a process of this node with SIGKILL, which ends stopped ones too.

    Args:
        spy: whether to read its Python stack from outside.

    Returns:
        Its state for people, and its stack or an empty text; None if there is no such process.
    """
    try:
        facts = _facts(pid)
    except OSError:
        return None
    if facts[19] != started or facts[0] == "Z":
        return None
    stack = _spy(pid) if spy else ""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return f"is {_STATES.get(facts[0], 'running')}", stack


def _spy(pid: int) -> str:
    """Read the Python stack of a process without its help; empty where that is not allowed."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return ""
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return ""
    if done.returncode != 0:
        return ""
    threads = re.split(r"\n(?=Thread )", done.stdout)
    return next((thread for thread in threads if "TrainingThread" in thread.splitlines()[0]), done.stdout)

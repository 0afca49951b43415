"""Says who holds a lease, as it stands in the lease's cell."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raymem.storage.errors import user_name

DURATION_S = 60.0
"""Seconds after which a lease that is not renewed may be taken. Longer than a process may be busy with one call."""
_LONGEST_S = 600.0
_ENDED = ("Z", "X")


@dataclass(frozen=True)
class Record:
    """A holder of a lease, and how often it has renewed it."""

    holder: str
    """A random name: of two processes with the same number on hosts of the same name, each has its own."""
    beat: int
    user: str
    host: str
    node: str
    """A name for the host as long as it runs, within which numbers of processes mean the same."""
    pid: int
    process_began: str | None
    """When the process began, as its host counts."""
    since: str
    """When the lease was taken, by the clock of the holder's host: for people only."""
    duration_s: float

    @staticmethod
    def own() -> Record:
        """Return the record of this process as a new holder."""
        return Record(
            uuid.uuid4().hex, 0, user_name(os.geteuid()), platform.node(), node(), os.getpid(),
            _process_began(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), DURATION_S,
        )  # fmt: skip

    def renewed(self) -> Record:
        """Return the record of the next renewal."""
        return dataclasses.replace(self, beat=self.beat + 1)

    def to_bytes(self) -> bytes:
        """Write the record as JSON."""
        return (json.dumps(dataclasses.asdict(self)) + "\n").encode()

    @property
    def is_alive(self) -> bool | None:
        """Whether the holder's process lives; None where this host cannot know."""
        if self.node != node() or self.process_began is None:
            return None
        return _process_began(self.pid) == self.process_began

    def __str__(self) -> str:
        return f"{self.user} on {self.host}, process {self.pid}, since {self.since}"


def read_record(data: bytes) -> Record | None:
    """Return the record in a cell; None if there is none, or none that can be read."""
    try:
        raw: Any = json.loads(data)
        values = {field.name: raw[field.name] for field in dataclasses.fields(Record)}
        texts = ("holder", "user", "host", "node", "since")
        if not all(isinstance(values[name], str) for name in texts) or type(values["pid"]) is not int:
            return None
        values["duration_s"] = min(max(float(values["duration_s"]), 0.0), _LONGEST_S)
        return Record(**values)
    except (ValueError, TypeError, KeyError):
        return None


@cache
def node() -> str:
    """Return a name for this host as long as it runs; containers of one host have names of their own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text().strip() if boot.exists() else ""
    numbers = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
    return hashlib.sha256(f"{platform.node()} {started} {numbers}".encode()).hexdigest()[:16]


def _process_began(pid: int) -> str | None:
    """Return when a process of this host began, in its clock's ticks; None if there is none, or if nobody says."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in _ENDED else others[18]

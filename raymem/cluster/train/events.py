"""Names what a driver learns of its run, in plain values for the way between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raymem.training.reporter import Row


@dataclass(frozen=True)
class Rows:
    """Metrics of steps, oldest first."""

    rows: Sequence[Row]
    replayed: int
    """How many of them, the first ones, are of an earlier session."""


@dataclass(frozen=True)
class Told:
    """The work that a rank begins, see :meth:`raymem.training.reporter.Reporter.progress`."""

    rank: int
    what: str


@dataclass(frozen=True)
class Logged:
    """A warning of a rank."""

    rank: int
    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class Scheduled:
    """The controller asks Ray for a group of workers."""

    num_workers: int


@dataclass(frozen=True)
class Restarted:
    """The group has failed, or never came up, and is started again."""

    reason: str


@dataclass(frozen=True)
class Resized:
    """A group that is well goes on with another number of workers, since nodes have come or are about to go."""

    num_workers: int
    step: int | None
    """The step that it has just saved; None if it goes on from the checkpoint before."""


Event = Rows | Told | Logged | Scheduled | Restarted | Resized

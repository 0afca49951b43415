"""Takes the loop's metrics. The loop knows this protocol only; who listens is the caller's choice."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from raymem import stopping

Row = dict[str, float]
"""One step's metrics: ``step`` (steps done, from 1), ``loss``, ``lr``, ``grad_norm``, ``tokens_per_s``, ``elapsed_s``
(of all sessions, from where each one's loop was set up), ``epoch``, and when due
``eval_loss``, ``eval_perplexity``, ``eval_loss/<name>`` of named evaluation data, ``upload_wait_s`` (for which training
stood still before this step because the checkpoint before was being uploaded still), ``peak_bytes``, and with it
``held_bytes/<term>``: what rank 0 keeps on its device between steps, for the terms weights, trainable and optimizer."""

Listener = Callable[[Sequence[Row]], None]
Status = Callable[[str], None]
"""A function that is told in a few words what is going on."""


def unheard(text: str) -> None:
    """Take a text and do nothing with it."""


class Wanted(enum.Enum):
    """What the surroundings of a run want of it between two steps."""

    NOTHING = enum.auto()
    SAVE = enum.auto()
    """A checkpoint: somebody asked for one, or a worker, or the node of one, is about to be taken away."""
    STOP = enum.auto()
    """A checkpoint, and the end of the run."""


@dataclass(frozen=True)
class Audience:
    """The functions of the driver that learn how a training goes."""

    rows: Sequence[Listener] = ()
    """Get every row; after a resume also those that an earlier session may have delivered."""
    new_rows: Sequence[Listener] = ()
    """Get the rows of steps that have just been taken."""
    status: Status = unheard
    """Learns what the run does before its first step and after its last one."""


class Reporter(Protocol):
    """Receives one row per step on every rank, in order."""

    def log(self, row: Row) -> None:
        """Take a row; it must be cheap, since it is called between steps."""

    def replay(self, rows: Sequence[Row]) -> None:
        """Take rows of an earlier session again: some of them may not have been delivered."""

    def flush(self) -> None:
        """Deliver everything; called at checkpoints and at the end, on every rank."""

    def wanted(self) -> Wanted:
        """Say what is wanted now, after a row was taken; all ranks get the same answer."""

    def saved(self, step: int) -> None:
        """Learn that the checkpoint of a step, which was wanted, is whole where it belongs; a worker that is to end may
        do so.
        """

    def progress(self, what: str, *, brief: bool = True, told: bool = False) -> None:
        """Learn what this rank does from now on; it must be cheap, since each step and evaluated batch calls it.

        Args:
            what: for people, such as ``step 12``.
            brief: whether it must be over within ``scaling.hang_timeout``.
            told: whether people are told, since no row of metrics will come soon.
        """


class LocalReporter:
    """Hands rows at once to listeners in this process: a progress display, a tracking sink.

    Args:
        listeners: get every row, as :attr:`Audience.rows`.
        new_rows, status: as in :class:`Audience`.
    """

    def __init__(
        self, *listeners: Listener, new_rows: Sequence[Listener] = (), status: Status = unheard
    ) -> None:  # fmt: skip
        self._listeners, self._new_rows, self._status = listeners, new_rows, status

    def log(self, row: Row) -> None:
        for listener in (*self._listeners, *self._new_rows):
            listener([row])

    def replay(self, rows: Sequence[Row]) -> None:
        for listener in self._listeners if rows else ():
            listener(rows)

    def flush(self) -> None:
        pass

    def wanted(self) -> Wanted:
        return Wanted.STOP if stopping.asked() else Wanted.NOTHING

    def saved(self, step: int) -> None:
        pass

    def progress(self, what: str, *, brief: bool = True, told: bool = False) -> None:
        if told:
            self._status(what)

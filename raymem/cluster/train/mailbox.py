"""Brings what happens in a run's other processes to its driver: an actor that keeps events until they are fetched."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymem.cluster.train.events import Event, Logged
from raymem.cluster.train.pulse import Beat
from raymem.errors import RaymemError


@ray.remote(num_cpus=0)
class Mailbox:
    """A small actor on the driver's node: events, beats, failures, and the error that ends a run for good."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._dropped = 0
        self._error: RaymemError | None = None
        self._beats: dict[int, Beat] = {}
        self._failures: list[int] = []
        self._stopping = False

    def push(self, event: Event) -> None:
        self._events.append(event)

    def events(self, received: int) -> list[Event]:
        """Return the events behind the first ``received`` ones, which the driver has and are dropped here."""
        del self._events[: received - self._dropped]
        self._dropped = received
        return self._events

    def fail(self, error: RaymemError) -> None:
        """Remember the user's error: Ray would retry it like a crash, and it would only come again."""
        self._error = self._error or error

    def error(self) -> RaymemError | None:
        return self._error

    def stop(self) -> None:
        """Ask the run to end at its next report."""
        self._stopping = True

    def is_stopping(self) -> bool:
        return self._stopping

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
    return Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@contextlib.contextmanager
def warnings_to_driver(mailbox: Any, rank: int) -> Iterator[None]:
    """Send this rank's warnings to the driver's terminal too: a worker's own log is seen by nobody who waits."""
    logger, handler = logging.getLogger("raymem"), _ToMailbox(mailbox, rank)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _ToMailbox(logging.Handler):
    def __init__(self, mailbox: Any, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._mailbox, self._rank = mailbox, rank

    def emit(self, record: logging.LogRecord) -> None:
        if logging.lastResort is not None:  # writes to the worker's log, as if there was no handler
            logging.lastResort.handle(record)
        with contextlib.suppress(ray.exceptions.RayError):  # the driver has gone, and so will this process
            self._mailbox.push.remote(Logged(self._rank, record.name, record.levelno, record.getMessage()))

"""Brings what happens in a run's other processes to its driver: an actor that keeps events until they are fetched."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymem.cluster.train.events import Event, Logged, Resized
from raymem.cluster.train.pulse import Beat
from raymem.errors import RaymemError

_NAMED = "raymem-run-"


@ray.remote(num_cpus=0)
class Mailbox:
    """A small actor on the driver's node: events, beats, failures, and the error that ends a run for good.

    Args:
        checkpoints: where the run's checkpoints lie.
    """

    def __init__(self, checkpoints: str = "") -> None:
        self._checkpoints = checkpoints
        self._requests = self._answered = self._saved_step = 0
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

    def ask_to_save(self) -> int:
        """Ask for a checkpoint, and return the number of the request, from 1."""
        self._requests += 1
        return self._requests

    def wishes(self) -> tuple[bool, int]:
        """Say whether the run is to end, and which is the last request for a checkpoint; 0 if all are answered."""
        return self._stopping, self._requests if self._requests > self._answered else 0

    def saved(self, step: int, request: int) -> None:
        """Learn that the checkpoint of a step answers the requests up to one."""
        self._saved_step, self._answered = step, max(self._answered, request)

    def answer(self, request: int) -> tuple[int, str] | None:
        """Return the step that was saved for a request and where its checkpoint lies; None while there is none."""
        return (self._saved_step, self._checkpoints) if self._answered >= request else None

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

    def regrouped(self, num_workers: int, step: int | None) -> None:
        """Learn that a group which is well ends, and another of that size goes on from the step that it has saved."""
        self._beats = {}
        self.push(Resized(num_workers, step))

    def failures(self) -> list[int]:
        return self._failures


def new_mailbox(checkpoints: str | None = None) -> Any:
    """Return a mailbox on the driver's own node, which must outlive every other one.

    Args:
        checkpoints: where those of a run lie, whose mailbox others may find by :func:`mailbox_of`.
    """
    context = ray.get_runtime_context()
    options: dict[str, Any] = {"scheduling_strategy": NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)}
    if checkpoints is not None:
        options["name"] = f"{_NAMED}{context.get_job_id()}-{time.time_ns()}"
    return Mailbox.options(**options).remote(checkpoints or "")  # type: ignore[attr-defined]


def mailbox_of(job_id: str) -> Any | None:
    """Return the mailbox of the run that a job trains now; None if it trains none.

    Args:
        job_id: hexadecimal, as Ray numbers its drivers.
    """
    named = list_named_actors(all_namespaces=True)
    ours = [actor for actor in named if str(actor["name"]).startswith(f"{_NAMED}{job_id}-")]
    if not ours:
        return None
    newest = max(ours, key=lambda actor: int(actor["name"].rpartition("-")[2]))
    try:
        return ray.get_actor(newest["name"], namespace=newest["namespace"])
    except ValueError:  # it has just gone
        return None


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

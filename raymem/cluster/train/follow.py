"""Follows a run from its driver: metrics to listeners, warnings to the log, and what is waited for to people."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray

from raymem import stopping
from raymem.cluster.connection import HeadCheck
from raymem.cluster.train.events import Event, Logged, Resized, Restarted, Rows, Scheduled, Told
from raymem.cluster.train.failures import TRAINING, Again
from raymem.cluster.train.waiting import Waiting
from raymem.recipe.schema import ScalingSection
from raymem.training.reporter import Audience

log = logging.getLogger(__name__)

_SAME_S = 60.0
"""Seconds in which several ranks that say the same are one."""


class Follower:
    """Tells an audience what events mean; knows nothing of Ray, but asks ``waiting`` about it.

    Args:
        waiting: says what a group of workers waits for, see :class:`Waiting`.
        again: how the work goes on after a failure.
    """

    def __init__(self, audience: Audience, waiting: Waiting, again: Again = TRAINING) -> None:
        self._audience, self._waiting, self._again = audience, waiting, again
        self._wanted: int | None = None
        self._hearing = contextlib.ExitStack()
        """Open while steps are taken: nothing is saved before the first one."""
        self._takes_steps = False
        self._said = ""
        self._logged: dict[str, float] = {}

    def take(self, events: Sequence[Event]) -> None:
        """Take events, oldest first."""
        for event in events:
            if isinstance(event, Rows):
                self._rows(event)
            elif isinstance(event, Scheduled):
                self._wanted = event.num_workers
            elif isinstance(event, Told):
                self._wanted = None
                if event.rank == 0:
                    self._tell(event.what)
            elif isinstance(event, Logged):
                self._log(event)
            elif isinstance(event, Resized):
                self._resize(event)
            else:
                self._restart(event)

    def look(self) -> None:
        """Say what the workers wait for, if they do and it is something else than before."""
        if self._wanted is None:
            return
        try:
            self._tell(self._waiting.words(self._wanted))
        except Exception as error:  # words are worth no run: the next look may know more
            log.debug("Ray does not say what the workers wait for: %s", error)

    def close(self) -> None:
        """Hear no request to end any more."""
        self._hearing.close()
        self._takes_steps = False

    def _rows(self, event: Rows) -> None:
        self._wanted = None
        if not self._takes_steps:
            self._hearing.enter_context(stopping.heard())
            self._takes_steps = True
        for listener in self._audience.rows if event.rows else ():
            listener(event.rows)
        new = event.rows[event.replayed :]
        for listener in self._audience.new_rows if new else ():
            listener(new)

    def _tell(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._audience.status(text)

    def _log(self, event: Logged) -> None:
        now = time.monotonic()
        if now - self._logged.get(event.text, -_SAME_S) >= _SAME_S:
            logging.getLogger(event.logger).log(event.level, "worker %d: %s", event.rank, event.text)
        self._logged[event.text] = now

    def _resize(self, event: Resized) -> None:
        self.close()
        self._wanted, self._said = None, ""
        start = self._again.start if event.step is None else f"from step {event.step}, which was saved for that"
        workers = f"{event.num_workers} worker{'s' * (event.num_workers > 1)}"
        self._tell(f"the cluster has room for {workers} now: the run goes on with so many {start}")

    def _restart(self, event: Restarted) -> None:
        self.close()
        self._wanted, self._said = None, ""
        log.warning("%s; the workers start again %s", event.reason, self._again.start)


class Follow:
    """Reads a mailbox in a thread while the driver waits for the run."""

    def __init__(self, mailbox: Any, audience: Audience, scaling: ScalingSection, again: Again = TRAINING) -> None:
        self._mailbox = mailbox
        self._follower = Follower(audience, Waiting.of(scaling), again)
        self._received = 0
        self._head = HeadCheck(ray.get_runtime_context().gcs_address)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Follow:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._deliver()
        self._follower.close()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            if stopping.asked():
                self._mailbox.stop.remote()
            self._deliver()
            self._follower.look()
            self._head.look()

    def _deliver(self) -> None:
        try:
            events = ray.get(self._mailbox.events.remote(self._received), timeout=10)
        except ray.exceptions.RayError:
            return  # the cluster is going away; the run itself will say so
        self._received += len(events)
        self._follower.take(events)

"""Does a piece of work with a storage in a thread of its own, which can be waited for or given up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from raymem.storage.retry import Abandoned, until

T = TypeVar("T")

_LEAVE_S = 5.0
"""Seconds for the request that is under way when work is given up; one that a silent store does not answer ends with
the process."""


class Background(Generic[T]):
    """Work that a thread does from now on.

    The thread is a daemon: a process that is to end does not wait for it.

    Args:
        work: takes part in no collective, since the training's own are entered meanwhile.
        name: of the thread, for who looks at stacks.
    """

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._outcome: Future[T] = Future()
        self._unwanted = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            with until(self._unwanted):
                self._outcome.set_result(work())
        except Abandoned:
            self._outcome.cancel()
        except BaseException as error:  # whatever it is, somebody waits for the outcome
            self._outcome.set_exception(error)

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._outcome.done()

    @property
    def has_failed(self) -> bool:
        return self.is_done and self._outcome.exception() is not None

    def result(self) -> T:
        """Wait for the outcome; return it, or raise the error that ended the work."""
        return self._outcome.result()

    def abandon(self) -> None:
        """Give the work up: nothing more is written once a request that is under way has ended."""
        self._unwanted.set()
        self._thread.join(_LEAVE_S)

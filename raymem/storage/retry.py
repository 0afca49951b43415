"""Tries again what failed because a storage was away: connections refused or cut, throttling, a mount's I/O errors.

The one place that waits. A file system tries a request a few times within seconds, which hides single losses; what
still fails begins anew here, from its start, until the storage is back or the time is over.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from raymem.errors import TransientStorageError

log = logging.getLogger(__name__)

RETRY_FOR_S = 300.0
"""Seconds for which an operation is tried again where no recipe says otherwise."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 15.0
_random = secrets.SystemRandom()  # jitter is not to be the same on every worker, nor to touch a seeded stream

_this_thread = threading.local()

Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")


class Abandoned(Exception):
    """Ends the work of a thread that nobody wants any more."""


@contextlib.contextmanager
def until(unwanted: threading.Event) -> Iterator[None]:
    """Let what this thread does with storages in the block end with :class:`Abandoned` once an event is set.

    It ends before the next chunk of a file, the next change and the next try, so that nothing is written afterwards.
    """
    _this_thread.unwanted = unwanted
    try:
        yield
    finally:
        del _this_thread.unwanted


def check_wanted() -> None:
    """Raise :class:`Abandoned` if nobody wants the work of this thread any more, see :func:`until`."""
    unwanted: threading.Event | None = getattr(_this_thread, "unwanted", None)
    if unwanted is not None and unwanted.is_set():
        raise Abandoned


class Outage:
    """A time in which a storage is away, from the first failure of an operation.

    Args:
        place: path or URI, for messages.
        retry_for_s: seconds after which an operation is given up.
    """

    def __init__(self, place: str, retry_for_s: float) -> None:
        self._place, self._retry_for_s = place, retry_for_s
        self._began: float | None = None
        self._wait_s = _FIRST_WAIT_S

    def wait(self, error: TransientStorageError) -> None:
        """Wait before the next try: twice as long each time, with jitter; the last try is when the time is over.

        Raises:
            TransientStorageError: it is over; says how long that was.
            Abandoned: see :func:`until`.
        """
        now, sentence = time.monotonic(), str(error).rstrip(".")
        if self._began is None:
            if self._retry_for_s <= 0:
                raise error
            self._began = now
            log.warning("%s; trying again for up to %s", sentence, _text(self._retry_for_s))
        left_s = self._began + self._retry_for_s - now
        if left_s <= 0:
            raise TransientStorageError(
                f"{sentence}; this was tried for {_text(now - self._began)}: run the same command again when the "
                "storage is back, which resumes from the last checkpoint, or raise storage.retry_for"
            ) from error
        time.sleep(min(left_s, self._wait_s * _random.uniform(0.5, 1.0)))
        check_wanted()
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)

    def end(self) -> None:
        """Say that the storage is back, if it was away."""
        if self._began is not None:
            log.warning("storage: %s is back after %s", self._place, _text(time.monotonic() - self._began))


def retrying(place: str, retry_for_s: float, operation: Callable[[], Value]) -> Value:
    """Return the value of an operation that may be done again from its start whenever it failed.

    Raises:
        TransientStorageError: it failed for ``retry_for_s``.
    """
    outage = Outage(place, retry_for_s)
    while True:
        try:
            value = operation()
        except TransientStorageError as error:
            outage.wait(error)
        else:
            outage.end()
            return value


class _Place(Protocol):
    path: str
    retry_for_s: float


Owner = TypeVar("Owner", bound=_Place)


def retried(
    method: Callable[Concatenate[Owner, Arguments], Value],
) -> Callable[Concatenate[Owner, Arguments], Value]:
    """Decorate a method of a storage that may be done again. They do not call each other: waits would add up."""

    @functools.wraps(method)
    def with_retries(self: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        return retrying(self.path, self.retry_for_s, functools.partial(method, self, *args, **kwargs))

    return with_retries


def _text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

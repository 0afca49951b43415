"""A lease on a run: taken by a conditional write, renewed in a thread, given back at the end, and lost if it expires.

Who finds a lease that somebody holds watches it: one that changes is alive, and one that has not changed for its whole
duration, by the watcher's own clock, is taken. No clocks of two hosts are compared. A holder that was cut off for that
long finds another one's name when it wants to renew, and stops.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Iterator

from raymem.errors import RunBusy, StorageError
from raymem.storage.leases.cells import Cell, Changed, Version
from raymem.storage.leases.held import holding, is_held
from raymem.storage.leases.record import DURATION_S, Record, read_record
from raymem.storage.retry import retrying

log = logging.getLogger(__name__)

RENEW_S = 10.0
"""Seconds between two renewals."""
_LOOK_S = 1.0
_WAIT_S = 5.0


@contextlib.contextmanager
def leased(cell: Cell, run: str, root: str, retry_for_s: float) -> Iterator[None]:
    """Hold the lease on a run; in the block :func:`raymem.storage.leases.held.check` knows it.

    Args:
        cell: where it lies.
        run: path or URI of the run, for messages.
        root: of the run, in its file system.
        retry_for_s: seconds for which taking it is tried again while the storage is away.

    Raises:
        RunBusy: somebody else holds it; names who, since when and until when.
        StorageError: the storage refuses.
    """
    lease = _Lease(cell, run, *_take(cell, run, retry_for_s))
    try:
        with lease, holding(root, lease):
            yield
    finally:
        lease.give_back()


@contextlib.contextmanager
def watched(cell: Cell, run: str, root: str, holder: str) -> Iterator[None]:
    """Work under a lease that the driver of this process holds; see :func:`leased`.

    Raises:
        StorageError: it is lost already.
    """
    watch = _Watch(cell, run, holder)
    with watch, holding(root, watch):
        watch.check()
        yield


def refusal(run: str, record: Record | None) -> RunBusy:
    """Return the error for a run that somebody else works on."""
    who = "" if record is None else f" ({record})"
    lasts_s = DURATION_S if record is None else record.duration_s
    return RunBusy(
        f"{run}: another process is training this run{who}; wait for it, stop it (its lease ends with it, or if it is "
        f"killed {lasts_s:.0f} s after that), or choose another name"
    )


def _take(cell: Cell, run: str, retry_for_s: float) -> tuple[Record, Version]:
    """Take a lease that nobody holds, or whose holder is gone."""
    seen = retrying(cell.place, retry_for_s, cell.read)
    if seen is not None and seen.data:
        record = read_record(seen.data)
        alive = None if record is None else record.is_alive
        if record is not None and alive and record.pid == os.getpid():
            alive = is_held(record.holder)  # else it could not be given back, because the storage was away
        if alive:
            raise refusal(run, record)
        if alive is None:
            seen = _outlived(cell, run, seen, retry_for_s)
    own = Record.own()
    try:
        version = retrying(cell.place, retry_for_s, lambda: cell.write(own.to_bytes(), seen))
    except Changed:
        now = retrying(cell.place, retry_for_s, cell.read)
        raise refusal(run, None if now is None else read_record(now.data)) from None
    _check_conditions(cell, run)
    return own, version


def _outlived(cell: Cell, run: str, seen: Version, retry_for_s: float) -> Version | None:
    """Watch a lease until it is given back or has expired.

    Time counts only while the cell can be read: a holder that is cut off from the storage as we are is not gone.

    Raises:
        RunBusy: it is renewed.
    """
    record = read_record(seen.data)
    lasts_s = DURATION_S if record is None else record.duration_s
    who = "somebody" if record is None else str(record)
    log.warning("%s: held by %s; waiting up to %.0f s to see whether it is still there", run, who, lasts_s)
    began = read = time.monotonic()
    while True:
        time.sleep(min(_LOOK_S, RENEW_S / 2))
        now = retrying(cell.place, retry_for_s, cell.read)
        if now is None or not now.data:
            return now
        if now.data != seen.data:
            raise refusal(run, read_record(now.data))
        before, read = read, time.monotonic()
        if read - before > RENEW_S:
            began = read
        if read - began > lasts_s:
            log.warning("%s: the lease of %s has expired and is taken over", run, who)
            return now


def _check_conditions(cell: Cell, run: str) -> None:
    """Prove that the store refuses a write whose condition does not hold: one that ignores it lets anybody in."""
    now = cell.read()
    with contextlib.suppress(Changed):
        cell.write(b"" if now is None else now.data + b"\n", None)
        raise StorageError(
            f"{run}: {cell.place} was written over although it is there: the object store ignores If-None-Match, by "
            "which two drivers of one run are told apart; update it, or use another storage"
        )


class _Hold:
    """A lease that a thread looks after."""

    def __init__(self, cell: Cell, run: str, holder: str, known_at: float) -> None:
        self.holder = holder
        self._cell, self._run = cell, run
        self._problem: str | None = None
        self._known_at = known_at
        """When the lease was last known to be ours, by this process's clock."""
        self._busy = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="raymem-lease", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(_WAIT_S)

    def check(self, *, ask: bool = True) -> None:
        """See :meth:`raymem.storage.leases.held.Hold.check`."""
        if ask and self._problem is None and time.monotonic() - self._known_at > 2 * RENEW_S:
            self._ask()
        if self._problem is not None:
            raise StorageError(self._problem)

    def _look_after(self) -> None:
        said = False
        while self._problem is None and not self._done.wait(RENEW_S):
            try:
                self._ask()
            except StorageError as error:  # while it lasts, nobody can write there, nor take the lease
                if not said:
                    log.warning("%s: the lease cannot be renewed now: %s", self._run, error)
                said = True
            else:
                said = False
        if self._problem is not None:
            log.error("%s", self._problem)

    def _ask(self) -> None:
        """Learn whether the lease is still ours."""
        with self._busy:
            began = time.monotonic()
            if self._problem is None and (new := self._touch()) is not None:
                who = f"was taken by {new}" if isinstance(new, Record) else "has been given back"
                self._problem = (
                    f"{self._run}: the lease on this run {who}, while this driver did not renew it for too long (it "
                    "was asleep, or cut off from the storage); it writes nothing more: let the other one go on, or "
                    "stop that and run the same command again, which resumes"
                )
            self._known_at = began

    def _touch(self) -> Record | str | None:
        """Return who has the lease now, where it is not ours any more."""
        raise NotImplementedError


class _Lease(_Hold):
    """A lease that this process renews."""

    def __init__(self, cell: Cell, run: str, record: Record, version: Version) -> None:
        super().__init__(cell, run, record.holder, time.monotonic())
        self._record = record
        self._version: Version | None = version

    def _touch(self) -> Record | str | None:
        record = self._record.renewed()
        try:
            self._version = self._cell.write(record.to_bytes(), self._version)
        except Changed:
            if (now := self._cell.read()) is not None:
                return read_record(now.data) or "somebody"
            self._version = None  # somebody has deleted the cell, which gives the lease to nobody
            return self._touch()
        self._record = record
        return None

    def give_back(self) -> None:
        """Let others take the lease at once."""
        if self._problem is not None or not self._busy.acquire(timeout=_WAIT_S):
            return
        try:
            self._cell.write(b"", self._version)
        except (Changed, StorageError) as error:
            log.warning("%s: the lease could not be given back, and expires by itself: %s", self._run, error)
        finally:
            self._busy.release()


class _Watch(_Hold):
    """A lease that the driver of this process renews."""

    def __init__(self, cell: Cell, run: str, holder: str) -> None:
        super().__init__(cell, run, holder, -math.inf)

    def _touch(self) -> Record | str | None:
        now = self._cell.read()
        record = None if now is None else read_record(now.data)
        if record is not None and record.holder == self.holder:
            return None
        return record or "somebody"

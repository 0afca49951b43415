"""Keeps the history of a run: ``metrics.jsonl`` in its directory, one line per step.

Rank 0 writes it where it writes checkpoints, and before them: whatever is killed, a checkpoint has its history. A run
that goes on cuts it at its checkpoint, so that a step that is taken again has one line, too.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from raymem.storage.errors import explain
from raymem.storage.identity import check
from raymem.storage.leases import held as leases
from raymem.storage.retry import retrying
from raymem.storage.storage import Storage
from raymem.training.reporter import Row

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"


def read_history(run: Storage, last_step: int) -> list[Row]:
    """Return a run's rows up to a step, one per step, in order; of a step with several (earlier versions) the last.

    Raises:
        StorageError: the file is there and cannot be read.
    """
    if not run.exists(FILE):
        return []
    rows: dict[float, Row] = {}
    for line in run.read_bytes(FILE).splitlines():
        try:
            row = json.loads(line)
            rows[float(row["step"])] = row
        except (ValueError, TypeError, KeyError):  # a kill may cut the last line, and a person may edit the file
            continue
    return [row for step, row in sorted(rows.items()) if step <= last_step]


class History:
    """The history of a run, as rank 0 writes it.

    In a directory a line is there as soon as its step is done. On an object store, where no file can grow, the file is
    written with each checkpoint, in the thread that uploads it.

    Args:
        run: storage of the run's directory.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._written = b""
        """What is in the file, or will be when its writer has run, on an object store; in a directory its length is
        enough."""
        self._length = 0
        self._waiting = b""
        self._failed = False

    def begin(self, step: int) -> None:
        """Keep the rows up to the step that training goes on from.

        Raises:
            StorageError: the file cannot be read or written.
        """
        rows = read_history(self._run, step)
        if len(rows) < step:
            log.warning(
                "%s has %d of %d steps: it was written by an earlier version, or changed", self._run.join(FILE),
                len(rows), step,
            )  # fmt: skip
        kept = b"".join(map(_line, rows))
        if kept or self._run.is_local:
            self._run.write_bytes(FILE, kept)
        self._length = len(kept)
        self._written = b"" if self._run.is_local else kept

    def add(self, row: Row) -> None:
        """Take the row of a step. One that cannot be written waits: a log is no reason to lose a run.

        Raises:
            StorageError: the run is known to be another driver's by now.
        """
        leases.check(self._run.root, ask=False)
        self._waiting += _line(row)
        if not self._run.is_local:
            return
        try:
            self._append()
        except OSError as error:
            if not self._failed:
                log.warning("%s: cannot be written now: %s", self._run.join(FILE), error.strerror)
            self._failed = True

    def save(self) -> None:
        """Write what waits, to the disk.

        Raises:
            StorageError: it cannot be written; neither could the checkpoint.
        """
        self.writer()()

    def writer(self) -> Callable[[], None]:
        """Return what writes the rows so far as :meth:`save` does; another thread may call it while rows are added.

        It is called before the checkpoint of the last of them is written. If it fails, so does the run.
        """
        if self._run.is_local:
            return lambda: retrying(self._run.path, self._run.retry_for_s, self._sync)
        if not self._waiting:
            return lambda: None
        self._written, self._waiting = self._written + self._waiting, b""
        return partial(self._run.write_bytes, FILE, self._written)

    def _sync(self) -> None:
        check(Path(self._run.root))  # else a mount that is gone would be a file that is not there
        try:
            self._append(durably=True)
        except OSError as error:
            raise explain(error, "write", self._run.join(FILE)) from error

    def _append(self, *, durably: bool = False) -> None:
        """Write the waiting lines behind those that are known to be whole, over what a failed attempt left."""
        descriptor = os.open(self._run.join(FILE), os.O_WRONLY | os.O_CREAT, 0o666)
        with open(descriptor, "wb") as file:
            length = min(self._length, os.fstat(descriptor).st_size)  # less: somebody deleted it
            file.truncate(length)
            file.seek(length)
            file.write(self._waiting)
            file.flush()
            if durably:
                os.fsync(descriptor)
        self._length, self._waiting = length + len(self._waiting), b""


def _line(row: Row) -> bytes:
    return (json.dumps(row) + "\n").encode()

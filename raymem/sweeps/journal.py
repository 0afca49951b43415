"""Opens the journal of a sweep, which Optuna writes: one growing file in a directory, its parts on an object store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import optuna
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection

from raymem.errors import StorageError
from raymem.storage.leases import held as leases
from raymem.storage.leases.cells import Changed, ObjectCell, Version
from raymem.storage.retry import retrying
from raymem.storage.storage import Storage
from raymem.sweeps.options import Objective, better

FILE = "journal.log"
"""The journal in a directory."""
FOLDER = "journal"
"""The directory of its parts on an object store, which in their order are the same file."""
PART_BYTES = 256 << 10
"""Size beyond which a part gets no more lines: with each line its part is stored anew."""

Value = TypeVar("Value")
DIRECTIONS = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}


def open_study(folder: Storage, objective: Objective, name: str) -> optuna.Study:
    """Open the study in a sweep's directory; its journal is begun if there is none.

    Raises:
        StorageError: on an object store, a part is missing or damaged, or cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend: BaseJournalBackend
    if folder.is_local:
        path = folder.join(FILE)
        backend = JournalFileBackend(path, lock_obj=JournalFileOpenLock(path))
    else:
        backend = ObjectJournal(folder)
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=name,
        directions=[DIRECTIONS[better(metric)] for metric in objective.metrics],
        load_if_exists=True,
    )


class ObjectJournal(BaseJournalBackend):
    """A journal on an object store, for one writer at a time.

    A line is there once :meth:`append_logs` has returned. Each part is written only over what this writer knows, so
    that a driver that has lost the sweep's lease can add nothing to what the next one reads.

    Raises:
        StorageError: a part is missing or damaged, or cannot be read.
    """

    def __init__(self, folder: Storage) -> None:
        self._folder = folder
        self._logs: list[dict[str, Any]] = []
        self._part = 0
        self._cell = self._cell_of(0)
        self._version: Version | None = None
        names = sorted(folder.sizes(FOLDER))
        for number, name in enumerate(names):
            if name != _name(number):
                raise StorageError(
                    f"{folder.join(FOLDER)}: {_name(number)} is missing and {name} is there, so that the journal of "
                    "the sweep is not whole; restore it from a copy, or start over with --fresh"
                )
            self._begin(number)
            self._version = self._read()
            self._logs += self._parsed(self._version.data)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Return the logs from a number on."""
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add logs.

        Raises:
            StorageError: they cannot be written, or another driver has gone on with the sweep.
        """
        lines = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        if self._version is not None and len(self._version.data) + len(lines) > PART_BYTES:
            self._begin(self._part + 1)
        data = lines if self._version is None else self._version.data + lines
        try:
            self._version = self._again(lambda: self._cell.write(data, self._version))
        except Changed:
            raise StorageError(
                f"{self._cell.place}: another driver has gone on with this sweep; let that one go on, or stop it and "
                "run the same command again"
            ) from None
        self._logs += self._parsed(lines)

    def _cell_of(self, part: int) -> ObjectCell:
        return ObjectCell(self._folder, f"{FOLDER}/{_name(part)}")

    def _begin(self, part: int) -> None:
        """Turn to a part, of which nothing is known yet."""
        self._part, self._cell, self._version = part, self._cell_of(part), None

    def _read(self) -> Version:
        version = self._again(self._cell.read)
        if version is None:
            raise StorageError(
                f"{self._cell.place}: was deleted while it was read; restore it, or start over with --fresh"
            )
        return version

    def _parsed(self, data: bytes) -> list[dict[str, Any]]:
        try:
            logs = [json.loads(line) for line in data.splitlines()]
        except ValueError as error:
            raise StorageError(
                f"{self._cell.place} is damaged ({error}); restore it from a copy, or start over with --fresh"
            ) from None
        return logs

    def _again(self, action: Callable[[], Value]) -> Value:
        def checked() -> Value:
            leases.check(self._folder.root)
            return action()

        return retrying(self._cell.place, self._folder.retry_for_s, checked)


def _name(part: int) -> str:
    return f"{part:06d}.jsonl"

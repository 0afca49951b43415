"""Keeps the rows of a run that its server has not taken yet, in files beside the run, so that no crash loses them."""

from __future__ import annotations

import json
import logging
import posixpath
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pyarrow import fs

_log = logging.getLogger("raymem.tracking")

Timed = tuple[int, Mapping[str, Any]]
"""The time at which a row came, in ms since 1970, and the row."""

_ROWS_AT_ONCE = 1000
_WAITING = re.compile(r"waiting-(\d{9})\.json")
_STATE = "state.json"


class Spool:
    """The files of one run.

    Args:
        filesystem: on which they lie.
        folder: their directory there; it is made with the first file.
    """

    def __init__(self, filesystem: fs.FileSystem, folder: str) -> None:
        self._fs, self.folder = filesystem, folder
        self._next: int | None = None

    def state(self) -> dict[str, Any]:
        """Return what :meth:`note` noted last, with the ``key`` by which the run is known; a new one if there is none.

        Raises:
            OSError: the storage does not answer.
            ValueError: the file is damaged.
        """
        path = posixpath.join(self.folder, _STATE)
        if self._fs.get_file_info(path).type == fs.FileType.NotFound:
            state = {"key": uuid.uuid4().hex}
            self.note(state)
            return state
        with self._fs.open_input_stream(path) as stream:
            state = json.loads(stream.read())
        if not isinstance(state, dict) or not isinstance(state.get("key"), str):
            raise ValueError(f"{path} is damaged: it holds no key; delete it, and a new run begins")
        return state

    def note(self, state: Mapping[str, Any]) -> None:
        """Write down plain values for the next process. Raises OSError."""
        self._write(_STATE, state)

    def add(self, rows: Sequence[Timed]) -> None:
        """Keep rows. Raises OSError."""
        if self._next is None:
            self._next = max((int(number) for number, _ in self._files()), default=0)
        self._next += 1
        self._write(f"waiting-{self._next:09d}.json", [[at_ms, dict(row)] for at_ms, row in rows])

    def batches(self) -> Iterator[list[Timed]]:
        """Return what is kept, oldest first, in parts of about a thousand rows; each is forgotten with the next call.

        Raises:
            OSError: the storage does not answer.
        """
        paths: list[str] = []
        rows: list[Timed] = []
        for _, path in sorted(self._files()):
            with self._fs.open_input_stream(path) as stream:
                text = stream.read()
            try:
                rows += [(int(at_ms), dict(row)) for at_ms, row in json.loads(text)]
            except (ValueError, TypeError):
                _log.warning("%s is damaged, its metrics are lost; it is kept as %s.damaged", path, path)
                self._fs.move(path, f"{path}.damaged")
                continue
            paths.append(path)
            if len(rows) >= _ROWS_AT_ONCE:
                yield rows
                self._forget(paths)
                paths, rows = [], []
        if rows:
            yield rows
        self._forget(paths)

    def _files(self) -> list[tuple[str, str]]:
        """Return number and path of each file with rows."""
        files = self._fs.get_file_info(fs.FileSelector(self.folder, allow_not_found=True))
        matches = ((_WAITING.fullmatch(file.base_name), file.path) for file in files)
        return [(match.group(1), path) for match, path in matches if match is not None]

    def _forget(self, paths: Sequence[str]) -> None:
        for path in paths:
            self._fs.delete_file(path)

    def _write(self, name: str, value: Any) -> None:
        """Write a file in one step: a kill leaves the one before, or none."""
        self._fs.create_dir(self.folder, recursive=True)
        path = posixpath.join(self.folder, name)
        with self._fs.open_output_stream(f"{path}.new") as stream:
            stream.write(json.dumps(value).encode())
        self._fs.move(f"{path}.new", path)

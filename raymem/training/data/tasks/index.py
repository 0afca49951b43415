"""Indexes remote files once for all machines: each by a step on some node, which leaves a record in the storage.

``cache/digests/<key>.json`` holds a file's content hash, its blocks and its first row, under a key of its address and
version. So whoever needs to know what prepared data is called reads a few kilobytes, not the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raymem.storage.publish import digest
from raymem.storage.storage import Storage
from raymem.training.data.packed.shared import CACHE, cache_dir
from raymem.training.data.readers import BLOCK_BYTES, FileBlock, read_block
from raymem.training.data.sources.copies import SourceFile
from raymem.training.data.sources.digests import index_of
from raymem.training.data.sources.index import FileIndex, IndexFiles
from raymem.training.data.sources.remote import RemoteFile
from raymem.training.data.tasks.copies import fetched
from raymem.training.job import StepJob

FOLDER = f"{CACHE}/digests"
_VERSION = 1
_FIELDS = {"content": (str,), "blocks": (list,), "first": (list, type(None))}
_CURE = "delete the file, and the data are read again"

RunSteps = Callable[[StepJob], None]


@dataclass(frozen=True)
class IndexStep:
    """A file to be indexed."""

    file: RemoteFile
    where: str
    """The place in the recipe that names it."""
    record: str
    """The name of its record in the storage."""
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.file.name


class Indexing:
    """A job that leaves the records of files; pickled as plain values.

    Args:
        files: each with the place in the recipe that names it.
        block_rows: the most rows of a block.
        max_bytes: the largest size of one row.
    """

    what = "reading the data"

    def __init__(
        self, storage: Storage, files: Sequence[tuple[RemoteFile, str]], block_rows: int, max_bytes: int
    ) -> None:
        self.storage, self._block_rows, self._max_bytes = storage, block_rows, max_bytes
        self._steps = [
            IndexStep(file, where, f"{FOLDER}/{self._key(file)}.json") for file, where in dict(files).items()
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Indexing, (self.storage, (), self._block_rows, self._max_bytes))

    def is_committed(self) -> bool:
        """Say whether all records are there."""
        return all(map(self.is_done, self._steps))

    def steps(self) -> list[IndexStep]:
        """Return one step for each file."""
        return self._steps

    def is_done(self, step: IndexStep) -> bool:
        """Say whether a record was there when this object first looked."""
        return Path(step.record).name in self._there

    @cached_property
    def _there(self) -> dict[str, int]:
        return self.storage.sizes(FOLDER)

    def memory_bytes(self, step: IndexStep) -> int:
        """Return a few rows, since files are read line by line."""
        return 4 * self._max_bytes

    def run(self, step: IndexStep) -> None:
        """Fetch a file, read it, and write its record.

        Raises:
            DataError: the file cannot be fetched or parsed, or changes meanwhile.
            StorageError: the storage or this node's cache cannot be written.
        """
        if self.storage.exists(step.record):
            return
        cache = cache_dir(self.storage)
        with fetched(step.file, step.where, cache, self._max_bytes) as path:
            content, blocks = index_of(path, step.file.name, cache, self._block_rows, self._max_bytes)
            first = next(iter(read_block(blocks[0]))) if blocks else None
        rows = [[block.first_row, block.num_rows, block.offset, block.first_line] for block in blocks]
        # Who reads the record looks at columns and texts of the first row only: what JSON does not know is shown.
        first = json.loads(json.dumps(first, default=repr))
        self.storage.write_record(step.record, {"content": content, "blocks": rows, "first": first})

    def commit(self) -> None:
        """Do nothing: each record counts by itself."""

    def result(self) -> dict[RemoteFile, FileIndex]:
        """Read the records. Raises StorageError if one is damaged."""
        return {step.file: self._read(step) for step in self._steps}

    def _read(self, step: IndexStep) -> FileIndex:
        record = self.storage.read_record(step.record, _FIELDS, cure=_CURE)
        blocks = [
            FileBlock(step.file.uri, first, count, at, line, step.file.name, self._max_bytes)
            for first, count, at, line in record["blocks"]
        ]
        first = None if record["first"] is None else (str(record["first"][0]), dict(record["first"][1]))
        return FileIndex(record["content"], blocks, first=first, remote=step.file)

    def _key(self, file: RemoteFile) -> str:
        return digest([_VERSION, self._block_rows, BLOCK_BYTES, file.uri, file.version, file.size])


def index_on_nodes(
    storage: Storage, run_steps: RunSteps, here: IndexFiles, block_rows: int, max_bytes: int
) -> IndexFiles:
    """Return the function that has remote files indexed by a job, and reads the others here.

    Args:
        run_steps: does the steps of a job, somewhere.
        here: indexes the files of this machine.
    """

    def index(files: Sequence[tuple[SourceFile, str]]) -> list[FileIndex]:
        remote = [(file, where) for file, where in files if isinstance(file, RemoteFile)]
        job = Indexing(storage, remote, block_rows, max_bytes)
        run_steps(job)
        of_file = job.result()
        return [of_file[file] if isinstance(file, RemoteFile) else here([(file, where)])[0] for file, where in files]

    return index

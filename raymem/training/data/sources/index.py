"""Says what a file of a source holds: its content hash, and the blocks to read it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymem.training.data.readers import FileBlock
from raymem.training.data.rows.tables import Row
from raymem.training.data.sources.copies import SourceFile, plain_copy
from raymem.training.data.sources.digests import index_of, stamp
from raymem.training.data.sources.remote import RemoteFile


@dataclass(frozen=True)
class FileIndex:
    """The contents of a file, without its rows."""

    content: str
    """SHA-256 of the plain bytes."""
    blocks: list[FileBlock]
    looks: dict[str, Any] | None = None
    """The outward facts of the plain file when it was indexed, where that is on this machine."""
    first: tuple[str, Row] | None = None
    """Place and values of the first row, where the file is not on this machine."""
    remote: RemoteFile | None = None
    """The file to fetch before a block is read, where it is not on this machine."""


IndexFiles = Callable[[Sequence[tuple[SourceFile, str]]], list[FileIndex]]
"""A function that indexes files, each with the place in the recipe that names it."""


def index_here(cache_dir: Path, block_rows: int, max_bytes: int) -> IndexFiles:
    """Return the function that reads files on this machine, remote ones by a copy in ``cache_dir``.

    It raises DataError for a file that cannot be read or parsed, or changes meanwhile.

    Args:
        block_rows: the most rows of a block.
        max_bytes: the largest size of one row.
    """

    def one(file: SourceFile, where: str) -> FileIndex:
        path = plain_copy(file, where, cache_dir, max_bytes)
        looks = stamp(path, file.name)
        content, blocks = index_of(path, file.name, cache_dir, block_rows, max_bytes)
        return FileIndex(content, blocks, looks)

    return lambda files: [one(file, where) for file, where in files]

"""Gives a step the file that it reads: each node fetches a file once, however many of its processes want it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymem.cache import alone
from raymem.entries import release
from raymem.training.data.sources.copies import plain_copy
from raymem.training.data.sources.remote import RemoteFile


@contextmanager
def fetched(file: RemoteFile, where: str, cache_dir: Path, max_bytes: int) -> Iterator[Path]:
    """Yield a copy of a file on this node; after the block it may go when others need the room.

    Args:
        where: where the recipe names it, for errors.
        max_bytes: the largest size of one row.

    Raises:
        DataError: it cannot be fetched, is damaged, or is not there in that version any more.
        StorageError: the cache cannot be written.
    """
    with alone(file.uri):
        copy = plain_copy(file, where, cache_dir, max_bytes)
    try:
        yield copy
    finally:
        release(copy.parent)

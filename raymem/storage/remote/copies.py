"""Copies the files of a model that lies on an object store into the cache of this node, where libraries read them."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from raymem.errors import StorageError
from raymem.storage.checksums import CHECKSUMS
from raymem.storage.connect import copy_file
from raymem.storage.errors import explain
from raymem.storage.publish import digest
from raymem.storage.remote.files import asked, storage_at
from raymem.storage.storage import Storage
from raymem.storage.unfinished import unfinished_name


def fetched(uri: str, patterns: Sequence[str]) -> Path:
    """Return a directory of this node's cache with the files of a remote directory that match a pattern.

    What is there already is not fetched again; the copy is named by the content, so a model that is replaced under its
    address is another one. Several processes may ask at once.

    Args:
        uri: ``s3://`` or ``gs://``.
        patterns: as those of a shell, for names directly in the directory.

    Raises:
        StorageError: it cannot be read, a file is not as its checksums say, or the cache cannot be written.
    """
    storage = storage_at(uri)
    infos = asked(storage, "", partial(_listed, storage))
    sizes = {info.base_name: info.size for info in infos if info.is_file}
    if CHECKSUMS in sizes:
        content: Any = storage.read_bytes(CHECKSUMS).decode(errors="replace")
    else:
        content = sorted([info.base_name, info.size, info.mtime_ns] for info in infos if info.is_file)
    directory = node_cache() / "models" / digest([uri.partition("?")[0], content])
    with _alone(directory):
        for name, size in sizes.items():
            target = directory / name
            if any(fnmatch(name, pattern) for pattern in patterns) and not (
                target.is_file() and target.stat().st_size == size
            ):
                _fetch(storage, name, target)
    return directory


def _listed(storage: Storage, path: str) -> Any:
    return storage.filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))


def node_cache() -> Path:
    """Return this user's directory on this node for copies of what lies on object stores.

    Raises:
        StorageError: it belongs to another user.
    """
    directory = Path(tempfile.gettempdir()) / f"raymem-cache-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise StorageError(f"{directory} belongs to another user; remove it, or set TMPDIR to a directory of your own")
    return directory


def _fetch(storage: Storage, name: str, target: Path) -> None:
    """Copy a file; it appears when it is whole."""
    scratch = target.parent / unfinished_name(name)

    def copy(path: str) -> None:
        copy_file(storage.filesystem, path, pafs.LocalFileSystem(), str(scratch))
        scratch.replace(target)

    try:
        asked(storage, name, copy)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a directory, which is made, for this process."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise explain(
            error, "make", str(directory), where="cache of this node", cure="set TMPDIR to another"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)

"""Directories that are being written, told from those that killed writers left.

Such a directory is locked by its writer, and the system gives the lock back when that process ends, however it ends.
A lock speaks for processes of one node only (on a network mount it need not reach further), so the name says which node
it was; what lies there of other nodes, or on a file system without locks, is judged by its age.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from raymem.storage.folders import make_directory

if TYPE_CHECKING:
    from raymem.storage.storage import Storage

PREFIX = ".writing-"
TEMPORARY_PREFIX = "raymem-tmp-"
ABANDONED_AFTER_S = 24 * 3600
"""Age at which another node's directory counts as left: a live writer touches its own far more often."""


def unfinished_name(name: str) -> str:
    """Return a new name for what becomes ``name``."""
    return f"{PREFIX}{name}-{_node()}-{uuid.uuid4().hex}"


@contextlib.contextmanager
def unfinished(parent: Path, name: str) -> Iterator[Path]:
    """Make a directory that is this process's own in the block, and remove what killed writers left beside it.

    It is removed in the end, unless it was renamed.

    Raises:
        OSError: the system refuses to make it.
    """
    lock = None
    while lock is None:
        directory = parent / unfinished_name(name)
        directory.mkdir()
        lock = _lock(directory)
    try:
        _remove_abandoned(directory, PREFIX)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def temporary(name: str) -> tempfile.TemporaryDirectory[str]:
    """Make a temporary directory, and remove what killed processes left of such.

    Raises:
        OSError: the system refuses to make it.
    """
    lock = None
    while lock is None:
        directory = tempfile.TemporaryDirectory(
            prefix=f"{TEMPORARY_PREFIX}{name}-{_node()}-", ignore_cleanup_errors=True
        )
        lock = _lock(Path(directory.name))
    weakref.finalize(directory, os.close, lock)
    _remove_abandoned(Path(directory.name), TEMPORARY_PREFIX)
    return directory


@contextlib.contextmanager
def scratch(storage: Storage, purpose: str) -> Iterator[str]:
    """Yield the name of a new directory of a storage, which is deleted with the block.

    On a disk what killed processes left of such goes, too.

    Raises:
        OSError, StorageError: the system refuses to make it, or to delete it.
    """
    if storage.is_local:
        make_directory(Path(storage.root))
        with unfinished(Path(storage.root), purpose) as directory:
            yield directory.name
        return
    name = f".raymem-{purpose}-{uuid.uuid4().hex}"
    try:
        yield name
    finally:
        storage.delete_dir(name, last=None)


def _lock(directory: Path) -> int | None:
    """Return the locked descriptor of a new directory; None if another process took it for left, and was faster."""
    try:
        lock = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if _locks(lock) is not False and directory.exists():
        return lock
    os.close(lock)
    return None


def _remove_abandoned(own: Path, prefix: str) -> None:
    """Remove what killed writers left beside a new directory, whose time is that of the file system."""
    now = own.stat().st_mtime
    for path in own.parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY)
            try:
                locked = _locks(lock)
                ours = locked is True and f"-{_node()}-" in path.name
                if ours or (locked is not False and now - _newest(path) > ABANDONED_AFTER_S):
                    shutil.rmtree(path)
            finally:
                os.close(lock)


def _locks(descriptor: int) -> bool | None:
    """Lock an open directory; False if another process holds it, None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _newest(path: Path) -> float:
    return max(item.stat().st_mtime for item in (path, *path.rglob("*")))


@cache
def _node() -> str:
    """Return a name for this node as long as it runs."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text() if boot.exists() else ""
    return hashlib.sha256(f"{platform.node()} {started}".encode()).hexdigest()[:8]

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
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PREFIX = ".writing-"
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
    directory, lock = _make_locked(parent, name)
    try:
        _remove_abandoned(parent, now=directory.stat().st_mtime)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _make_locked(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        directory = parent / unfinished_name(name)
        directory.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process took it for left, and was faster
            lock = os.open(directory, os.O_RDONLY)
            if _locks(lock) is not False and directory.exists():
                return directory, lock
            os.close(lock)


def _remove_abandoned(parent: Path, now: float) -> None:
    """Remove what killed writers left.

    Args:
        now: the time of the file system, which may not be this node's, in the same seconds as its files have.
    """
    for path in parent.glob(f"{PREFIX}*"):
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
    """A name for this node as long as it runs."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text() if boot.exists() else ""
    return hashlib.sha256(f"{platform.node()} {started}".encode()).hexdigest()[:8]

"""Makes directories in a storage: never the storage itself again once it is gone, and shared where users share it."""

from __future__ import annotations

import uuid
from pathlib import Path

from raymem.storage.identity import FILE, check
from raymem.storage.permissions import share, share_contents


def make_directory(directory: Path) -> None:
    """Make a directory, and those above it that are missing, by the umask of this user.

    Raises:
        OSError: the system refuses.
        StorageError: it belongs into a storage that this process works on, and that is gone.
    """
    check(directory)
    directory.mkdir(parents=True, exist_ok=True)


def make_shared(directory: Path, root: Path | None = None) -> None:
    """Make a directory for all who share the storage it lies in; elsewhere see :func:`make_directory`.

    Args:
        root: a directory that is shared like a storage; by default the storage.

    Raises:
        OSError, StorageError: see :func:`make_directory`.
    """
    check(directory)
    root = root or storage_above(directory)
    if root is None or not root.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        return
    for folder in reversed([directory, *directory.parents]):
        if folder.is_relative_to(root) and not folder.is_dir():
            _make_whole(folder)


def share_published(path: Path) -> None:
    """Let all who share the storage that a file or directory lies in read it; elsewhere do nothing."""
    if storage_above(path) is not None:
        share_contents(path)


def storage_above(directory: Path) -> Path | None:
    """Return the root of the storage that a path lies in, or None."""
    return next((path for path in directory.parents if (path / FILE).exists()), None)


def _make_whole(folder: Path) -> None:
    """Make a directory that has its rights when it appears: another user may be waiting for it."""
    scratch = folder.parent / f".making-{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        share(scratch, writable=True)
        scratch.rename(folder)
    except OSError:
        scratch.rmdir()
        if not folder.is_dir():  # else another process was faster
            raise

"""Lets one driver at a time work on a run, and makes room for a run that starts over."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from raymem.errors import StorageError
from raymem.storage.storage import Storage

log = logging.getLogger(__name__)


@contextlib.contextmanager
def only_one(storage: Storage, name: str) -> Iterator[None]:
    """Hold the run's lock; the system gives it back when the process ends, however it ends.

    Raises:
        StorageError: the storage cannot be written, or another process on a node that shares the lock trains a run of
            this name.
    """
    storage.check_writable()
    if not storage.is_local:
        yield
        return
    with _lock_file(storage, name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"{storage.join(name)}: another process is training this run; wait for it, stop it, or choose "
                "another name"
            ) from None
        yield


@contextlib.contextmanager
def in_turn(storage: Storage, name: str) -> Iterator[None]:
    """Wait for whoever does the same work, on any node that shares the lock; the storage is a directory."""
    with _lock_file(storage, name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_aside(storage: Storage, name: str) -> None:
    """Rename an existing run to ``<name>.old-<n>``; nothing is deleted for the user.

    Raises:
        StorageError: an object store cannot rename.
    """
    if not storage.exists(name):
        return
    if not storage.is_local:
        raise StorageError(
            f"{storage.join(name)}: --fresh cannot rename a run on an object store; delete it there, or choose "
            "another name"
        )
    number = 1
    while storage.exists(f"{name}.old-{number}"):
        number += 1
    os.rename(storage.join(name), storage.join(f"{name}.old-{number}"))
    log.info("the earlier run is now %s", storage.join(f"{name}.old-{number}"))


def _lock_file(storage: Storage, name: str) -> Path:
    folder = Path(storage.join(".locks"))
    folder.mkdir(exist_ok=True)
    return folder / name

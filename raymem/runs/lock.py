"""Lets one driver at a time work on a run, and makes room for a run that starts over."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from raymem.errors import StorageError
from raymem.storage.errors import user_name, writing
from raymem.storage.folders import make_shared
from raymem.storage.identity import held
from raymem.storage.permissions import open_lock
from raymem.storage.storage import Storage

log = logging.getLogger(__name__)

_LOCKS = ".locks"


@contextlib.contextmanager
def only_one(storage: Storage, name: str) -> Iterator[None]:
    """Hold the run's lock; the system gives it back when the process ends, however it ends.

    In the block the storage is held, too: see :func:`raymem.storage.identity.held`.

    Raises:
        StorageError: the storage cannot be written, another process on a node that shares the lock trains a run of this
            name, or another user's run of this name lies there.
    """
    storage.check_writable()
    if not storage.is_local:
        yield
        return
    with held(Path(storage.root)), _lock_file(storage, name) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"{storage.join(name)}: another process is training this run{_holder(file)}; wait for it, stop it, or "
                "choose another name"
            ) from None
        _check_own(storage, name)
        with _named(file):
            yield


@contextlib.contextmanager
def in_turn(storage: Storage, name: str) -> Iterator[None]:
    """Wait for whoever does the same work, on any node that shares the lock; the storage is a directory."""
    with _lock_file(storage, name) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_aside(storage: Storage, name: str) -> None:
    """Rename an existing run to ``<name>.old-<n>``; nothing is deleted for the user.

    Raises:
        StorageError: an object store cannot rename, or the directory may not be renamed.
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
    storage.rename_dir(name, f"{name}.old-{number}")
    log.info("the earlier run is now %s", storage.join(f"{name}.old-{number}"))


@contextlib.contextmanager
def _lock_file(storage: Storage, name: str) -> Iterator[IO[str]]:
    """Open a lock that any user of the storage may hold."""
    path = Path(storage.join(_LOCKS, name))
    with writing(path):
        make_shared(path.parent)
        file = open_lock(path)
    with file:
        yield file


@contextlib.contextmanager
def _named(file: IO[str]) -> Iterator[None]:
    """Write into a lock who holds it, while it is held."""
    if not file.writable():
        yield
        return
    holder = f"{user_name(os.geteuid())} on {platform.node()}, process {os.getpid()}\n"
    with contextlib.suppress(OSError):  # a full disk, which is said where it matters
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), holder.encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.truncate(file.fileno(), 0)


def _holder(file: IO[str]) -> str:
    """Return who holds a lock, in brackets; nothing where that is not known."""
    with contextlib.suppress(OSError, ValueError):
        if named := file.read(300).partition("\n")[0]:
            return f" ({named})"
    return ""


def _check_own(storage: Storage, name: str) -> None:
    """Refuse to go on with a run of another user that this one may not write."""
    run = Path(storage.join(name))
    with writing(run, cure=f"choose another name for this run (name: {name})"):
        if run.exists() and not os.access(run, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")

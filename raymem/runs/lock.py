"""Lets one driver at a time work on a run, and makes room for a run that starts over."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from raymem.errors import RunBusy
from raymem.storage.errors import explain, writing
from raymem.storage.folders import make_shared
from raymem.storage.identity import held
from raymem.storage.leases.cells import LOCKS, run_cell
from raymem.storage.leases.lease import leased, refusal
from raymem.storage.leases.record import read_record
from raymem.storage.permissions import open_lock
from raymem.storage.storage import Storage

log = logging.getLogger(__name__)

_MOST = 4096
"""Characters of a lock file that are read."""


@contextlib.contextmanager
def only_one(storage: Storage, name: str) -> Iterator[None]:
    """Work alone on a run: hold its lease, and in a directory also a file lock.

    A file lock ends with its process, however that ends, so that the next driver on a host goes on at once; but not
    every mount brings it to other hosts. The lease does that, and does the same on an object store.

    In the block the storage is held, too: see :func:`raymem.storage.identity.held`.

    Raises:
        RunBusy: another process trains a run of this name.
        StorageError: the storage cannot be written, or another user's run of this name lies there.
    """
    storage.check_writable()
    with contextlib.ExitStack() as stack:
        writable = True
        if storage.is_local:
            stack.enter_context(held(Path(storage.root)))
            writable = stack.enter_context(_locked(storage, name)).writable()
            _check_own(storage, name)
        if writable:
            run = storage.child(name)
            stack.enter_context(leased(run_cell(storage, name), run.path, run.root, storage.retry_for_s))
        yield


@contextlib.contextmanager
def _locked(storage: Storage, name: str) -> Iterator[IO[str]]:
    """Lock the file of a run in a directory."""
    with _lock_file(storage, name) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal(storage.join(name), read_record(file.read(_MOST).encode())) from None
        except OSError as error:
            raise explain(error, "lock", file.name, cure="mount it with locks, or use another storage") from error
        yield file


@contextlib.contextmanager
def in_turn(storage: Storage, name: str) -> Iterator[None]:
    """Wait for whoever does the same work, on any node.

    Raises:
        StorageError: the storage cannot be written.
    """
    if not storage.is_local:
        work = storage.child(name)
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(leased(run_cell(storage, name), work.path, work.root, storage.retry_for_s))
                    break
                except RunBusy:
                    time.sleep(1.0)
            yield
        return
    with _lock_file(storage, name) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_aside(storage: Storage, name: str) -> None:
    """Rename an existing run to ``<name>.old-<n>``; nothing is deleted for the user.

    An object store cannot rename: there the files are copied, which takes as long as fetching and storing them again.

    Raises:
        StorageError: the directory may not be renamed, or the files cannot be copied.
    """
    if not storage.exists(name):
        return
    number = 1
    while storage.exists(f"{name}.old-{number}"):
        number += 1
    storage.rename_dir(name, f"{name}.old-{number}")
    log.info("the earlier run is now %s", storage.join(f"{name}.old-{number}"))


@contextlib.contextmanager
def _lock_file(storage: Storage, name: str) -> Iterator[IO[str]]:
    """Open a lock that any user of the storage may hold."""
    path = Path(storage.join(LOCKS, name))
    with writing(path):
        make_shared(path.parent)
        file = open_lock(path)
    with file:
        yield file


def _check_own(storage: Storage, name: str) -> None:
    """Refuse to go on with a run of another user that this one may not write."""
    run = Path(storage.join(name))
    with writing(run, cure=f"choose another name for this run (name: {name})"):
        if run.exists() and not os.access(run, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")

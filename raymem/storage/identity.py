"""Knows a storage again: a run that began on one never goes on in whatever lies under its path later.

The first run on a directory writes a file with a random id into its root. A run remembers the id while it works, in
every process. When a mount is gone, the path leads to the empty directory that the mount had covered: no such file is
there, and the run stops before it writes. An object store needs none of this: a bucket that is gone is an error.
"""

from __future__ import annotations

import contextlib
import json
import platform
import uuid
from collections.abc import Iterator
from pathlib import Path

from raymem.errors import StorageError
from raymem.storage import json_files
from raymem.storage.errors import explain, writing
from raymem.storage.leases import held as leases
from raymem.storage.permissions import make_file

FILE = ".raymem-storage.json"

_held: dict[Path, str] = {}
"""The storages that this process works on, with their ids."""


def identify(root: Path) -> str:
    """Return the id of the storage in a directory; one that has none gets it, and is made if it is missing.

    Raises:
        StorageError: it cannot be read or written, its file is damaged, or this process works on a storage of that path
            that is gone.
    """
    if root in _held:
        check(root)
        return _held[root]
    if (known := read_id(root)) is not None:
        return known
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        make_file(root / FILE, json.dumps({"id": uuid.uuid4().hex}) + "\n")  # of two that come first, one names it
    known = read_id(root)
    assert known is not None
    return known


@contextlib.contextmanager
def held(root: Path, known: str | None = None) -> Iterator[str]:
    """Work on a storage: in the block :func:`check` refuses what lies under its path once it is another one.

    Args:
        known: its id, as another process of the same run has it; by default what is there now.

    Raises:
        StorageError: it is not the storage of this id, or see :func:`identify`.
    """
    before, now = _held.get(root), known or identify(root)
    _held[root] = now
    try:
        check(root)
        yield now
    finally:
        if before is None:
            del _held[root]
        else:
            _held[root] = before


def check(path: Path) -> None:
    """Refuse to write to a path in a storage that this process works on, if that is gone or its run is another's.

    Raises:
        StorageError: see :func:`check_id` and :func:`raymem.storage.leases.held.check`.
    """
    leases.check(str(path))
    for root, known in _held.items():
        if path.is_relative_to(root):
            check_id(root, known)


def check_id(root: Path, known: str) -> None:
    """Refuse a directory that is not the storage of this id.

    Raises:
        StorageError: names the storage, this machine and the cure.
    """
    if (now := read_id(root)) != known:
        reason = f"it has no {FILE}" if now is None else f"its {FILE} names another storage"
        raise StorageError(
            f"storage.path: {root} on {platform.node()} is not the storage that this run began on ({reason}); nothing "
            "was written there: mount the storage again, then run the same command again, which resumes"
        )


def read_id(root: Path) -> str | None:
    """Return the id of the storage in a directory; None if there is none.

    Raises:
        StorageError: its file is damaged or may not be read.
        TransientStorageError: the mount does not answer.
    """
    path = root / FILE
    try:
        if not path.exists():
            return None
    except OSError as error:  # a mount whose server is away
        raise explain(error, "look up", str(path)) from error
    cure = "restore it, or delete it: the next run then makes a new one"
    return str(json_files.read_object(path, StorageError, cure, {"id": (str,)})["id"])

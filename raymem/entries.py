"""Keeps a cache within its limit: whole entries go, those used longest ago first, and none that a process uses.

An entry is a file or directory in a folder of the cache, such as ``data/<key>``. Its users hold a shared lock on it,
which the system gives back when that process ends, however it ends; what is removed is locked exclusively before. The
time of its last use is the time at which it was last changed, to which holding it sets that.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from raymem.memory.budget import bytes_text
from raymem.storage.unfinished import unfinished_name

log = logging.getLogger(__name__)

UNLOCKED_AFTER_S = 7 * 24 * 3600
"""Age from which an entry counts as unused on a file system without locks."""

_held: dict[Path, int] = {}
"""The entries that this process uses -> descriptors that are locked."""


def hold(entry: Path) -> bool:
    """Keep an entry until this process ends, and note that it is used now; False if it is not there.

    It may be told again of an entry that it holds.
    """
    try:
        descriptor = os.open(entry, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for who is removing it
    if not _is_at(descriptor, entry):
        os.close(descriptor)
        return False
    if (before := _held.pop(entry, None)) is not None:
        os.close(before)
    _held[entry] = descriptor
    touch(entry)
    return True


def release(entry: Path) -> None:
    """Keep an entry no longer: it may go when others need the room."""
    if (descriptor := _held.pop(entry, None)) is not None:
        os.close(descriptor)


def touch(entry: Path) -> None:
    """Note that an entry is used now."""
    with suppress(OSError):  # another user's
        os.utime(entry)


def make_room(root: Path, limit_bytes: int) -> None:
    """Remove the entries of a cache that were used longest ago, until the others have at most ``limit_bytes``.

    What stays above the limit because it is in use, or another user's, is named in a warning.
    """
    entries = sorted(_entries(root), key=lambda entry: entry.used_ns)
    size = sum(entry.num_bytes for entry in entries)
    for entry in entries:
        if size <= limit_bytes:
            return
        if _remove(entry):
            log.info("%s (%s) is removed from the cache", entry.path, bytes_text(entry.num_bytes))
            size -= entry.num_bytes
    if size > limit_bytes:
        log.warning(
            "%s holds %s, more than RAYMEM_CACHE_LIMIT=%s: the rest is in use, or may not be removed", root,
            bytes_text(size), bytes_text(limit_bytes),
        )  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    path: Path
    num_bytes: int
    used_ns: int


def _entries(root: Path) -> Iterator[_Entry]:
    for folder in root.iterdir() if root.is_dir() else ():
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.startswith("."):  # being made, or being removed
                continue
            with suppress(OSError):  # just removed by another process
                used_ns = path.stat().st_mtime_ns
                files = [file.stat() for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path.stat()]
                yield _Entry(path, sum(file.st_size for file in files), used_ns)


def _remove(entry: _Entry) -> bool:
    """Remove an entry that nobody uses; says whether it is gone."""
    try:
        descriptor = os.open(entry.path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:  # a file system without locks
        if time.time_ns() - entry.used_ns < UNLOCKED_AFTER_S * 10**9:
            os.close(descriptor)
            return False
    try:
        if not _is_at(descriptor, entry.path) or entry.path.stat().st_mtime_ns != entry.used_ns:
            return False  # made again, or used, since it was looked at
        if not entry.path.is_dir():
            entry.path.unlink()
            return True
        # In one step, so that nobody finds half of it; what a kill leaves then, the next writer beside it removes.
        doomed = entry.path.with_name(unfinished_name(entry.path.name))
        entry.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Say whether an open file or directory still has its name."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False

"""Remembers content hashes and block indices of files, so that gigabytes are read once.

A file that looks untouched has the contents that it had. What it looks like is its path, size, inode and the times of
its last modification and change; after a move, its device, inode, size and modification time. The content hash alone
names prepared data, so a file that only looks new is read once more, but nothing is made anew.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from pathlib import Path
from typing import Any

from raymem.errors import DataError, StorageError
from raymem.storage.folders import make_shared, share_published
from raymem.storage.publish import digest, file_sha256, seal, unseal
from raymem.training.data.readers import BLOCK_BYTES, FileBlock, index_file

FOLDER = "digests"
_VERSION = 1
_SETTLED_NS = 2_000_000_000
"""Age below which a file may be written again within the same tick of its clock, so that its times do not show it."""


def index_of(path: Path, name: str, cache_dir: Path, block_rows: int) -> tuple[str, list[FileBlock]]:
    """Return SHA-256 and blocks of a plain file.

    Args:
        name: what to call it in errors.

    Raises:
        DataError: it cannot be read or parsed, or changes meanwhile.
    """
    kind = ["blocks", block_rows, BLOCK_BYTES]
    if (known := _recall(path, kind, cache_dir)) is not None:
        content, rows = known
        return content, [FileBlock(str(path), first, count, at, line, name) for first, count, at, line in rows]
    before = stamp(path, name)
    content, blocks = index_file(path, block_rows, name)
    rows = [[block.first_row, block.num_rows, block.offset, block.first_line] for block in blocks]
    _remember(path, name, before, kind, [content, rows], cache_dir)
    return content, blocks


def content_digest(path: Path, cache_dir: Path) -> str:
    """Return SHA-256 of a file's bytes as they are.

    Raises:
        DataError: it cannot be read, or changes meanwhile.
    """
    if (known := _recall(path, ["bytes"], cache_dir)) is not None:
        return str(known)
    before = stamp(path, str(path))
    try:
        content = file_sha256(path)
    except OSError as error:
        raise _unreadable(str(path), error) from error
    _remember(path, str(path), before, ["bytes"], content, cache_dir)
    return content


def stamp(path: Path, name: str) -> dict[str, Any]:
    """Return the outward facts of a file: path, size, inode and times.

    Raises:
        DataError: it is gone, or cannot be looked at.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(name, error) from error
    return {
        "path": str(path),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
        "device": status.st_dev,
    }


def is_rewritten(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Say whether a file was written or replaced between two looks; new permissions or links do not matter."""
    return any(then[key] != now[key] for key in ("size", "mtime_ns", "inode"))


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(f"{name} cannot be read ({error.strerror or error}): check that this process may read it.")


def _keys(looks: dict[str, Any], kind: list[Any]) -> list[str]:
    return [digest([_VERSION, kind, looks["path"]]), digest([_VERSION, kind, looks["device"], looks["inode"]])]


def _recall(path: Path, kind: list[Any], cache_dir: Path) -> Any:
    """Return the remembered record of a file that looks as it did then, or None."""
    try:
        now = stamp(path, str(path))
        for key in _keys(now, kind):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                entry = unseal(json.loads((cache_dir / FOLDER / f"{key}.json").read_bytes()))
                if entry is not None and _is_untouched(entry["looks"], now):
                    return entry["value"]
    except DataError:
        return None  # reading it says so better
    return None


def _is_untouched(then: dict[str, Any], now: dict[str, Any]) -> bool:
    if then["path"] == now["path"]:
        # The device of a network mount differs between nodes. The time of change tells if others were set back.
        return all(then[key] == now[key] for key in ("size", "mtime_ns", "ctime_ns", "inode"))
    # Whole seconds are times that somebody has set, as archives do for all their files; inodes are used again.
    moved = all(then[key] == now[key] for key in ("size", "mtime_ns", "inode", "device"))
    return moved and now["mtime_ns"] % 1_000_000_000 != 0


def _remember(path: Path, name: str, before: dict[str, Any], kind: list[Any], value: Any, cache_dir: Path) -> None:
    if is_rewritten(before, stamp(path, name)):
        raise DataError(f"{name} changed while it was read: run again when it is complete.")
    with contextlib.suppress(OSError, StorageError):  # reading it again costs time only
        folder = cache_dir / FOLDER
        make_shared(folder)
        probe = folder / f".{uuid.uuid4().hex}"
        try:
            for key in _keys(before, kind):
                probe.write_text(json.dumps(seal({"looks": before, "value": value})))
                # The file may lie where the cache lies, on a server with a clock of its own, or on this node.
                now = min(time.time_ns(), probe.stat().st_mtime_ns)
                if now - max(before["mtime_ns"], before["ctime_ns"]) < _SETTLED_NS:
                    return
                share_published(probe)
                probe.replace(folder / f"{key}.json")
        finally:
            probe.unlink(missing_ok=True)

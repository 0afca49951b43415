"""Copies the files of a model that lies on an object store into the cache of this node, where libraries read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from raymem.cache import alone, cache_root, kept, limit_bytes
from raymem.entries import make_room
from raymem.storage.checksums import CHECKSUMS
from raymem.storage.connect import copy_file
from raymem.storage.errors import writing
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
        patterns: as those of a shell: ``*.json`` for names directly in the directory, ``*/*`` for those in folders.

    Raises:
        StorageError: it cannot be read, or the cache cannot be written.
    """
    storage = storage_at(uri)
    depth = max(pattern.count("/") for pattern in patterns)
    infos = [info for info in asked(storage, "", partial(_listed, storage, depth > 0)) if info.is_file]
    sizes = {info.path[len(storage.root) :].strip("/"): info.size for info in infos}
    if CHECKSUMS in sizes:
        content: Any = storage.read_bytes(CHECKSUMS).decode(errors="replace")
    else:
        content = sorted([info.base_name, info.size, info.mtime_ns] for info in infos)
    with writing(root := cache_root(), where="RAYMEM_CACHE"):
        (root / "models").mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = root / "models" / digest([uri.partition("?")[0], content])
    wanted = {name: size for name, size in sizes.items() if any(_matches(name, pattern) for pattern in patterns)}
    if kept(directory, partial(_fetch_missing, storage, directory, wanted)):
        make_room(root, limit_bytes())
    return directory


def _listed(storage: Storage, recursive: bool, path: str) -> Any:
    return storage.filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _fetch_missing(storage: Storage, directory: Path, sizes: Mapping[str, int]) -> int:
    """Fetch what a directory lacks of some files; returns how many that were."""
    count = 0
    with writing(directory, where="RAYMEM_CACHE"):
        directory.mkdir(exist_ok=True)
    with alone(str(directory)):
        for name, size in sizes.items():
            target = directory / name
            if not (target.is_file() and target.stat().st_size == size):
                with writing(target, where="RAYMEM_CACHE"):
                    target.parent.mkdir(parents=True, exist_ok=True)
                _fetch(storage, name, target)
                count += 1
    return count


def _fetch(storage: Storage, name: str, target: Path) -> None:
    """Copy a file; it appears when it is whole."""
    scratch = target.parent / unfinished_name(target.name)

    def copy(path: str) -> None:
        copy_file(storage.filesystem, path, pafs.LocalFileSystem(), str(scratch))
        scratch.replace(target)

    try:
        asked(storage, name, copy)
    finally:
        scratch.unlink(missing_ok=True)

"""Publishes directories that appear whole or not at all.

Prepared data and the demo corpus are both directories named by their content. They are written under a temporary
name beside their place, get ``manifest.json`` (sizes and SHA-256 of every file, and the writer's own facts) last, and
are then renamed. Whoever sees the final name therefore sees a finished directory, and two writers of the same content
cannot disturb each other: the second rename fails and its copy is thrown away.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raymem.errors import DataError
from raymem.storage.errors import writing
from raymem.storage.folders import make_shared, share_published
from raymem.storage.inside import is_inside
from raymem.storage.json_files import as_object, parse
from raymem.storage.permissions import by_umask
from raymem.storage.unfinished import unfinished, unfinished_name

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def digest(value: Any) -> str:
    """Return a hex key (32 digits) of a value of plain JSON types; equal values have equal keys on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_good: set[tuple[str, str, int, int, int]] = set()
"""Files whose bytes this process has compared with a digest, as they were then: reading them once is enough."""


def compared_sha256(path: Path, expected: str) -> str:
    """Return the hex SHA-256 of a file; one that this process has found to be ``expected`` is not read again."""
    facts = path.stat()
    state = (str(path), expected, facts.st_ino, facts.st_mtime_ns, facts.st_size)
    if state in _good:
        return expected
    if (actual := file_sha256(path)) == expected:
        _good.add(state)
    return actual


def seal(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the SHA-256 of all its other values, which every later schema writes in the same way."""
    values = json.loads(json.dumps({key: value for key, value in raw.items() if key != "sha256"}))
    text = json.dumps(values, sort_keys=True)
    return {**values, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def unseal(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Return what was sealed, without the SHA-256; None if that is of other values (older records have none)."""
    if "sha256" in raw and seal(raw)["sha256"] != raw["sha256"]:
        return None
    return {key: value for key, value in raw.items() if key != "sha256"}


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished directory, or None where nothing finished is there.

    Finished means that the manifest exists and every file has the size it names, which also notices a download or a
    copy that stopped half-way. Contents are checked by :func:`publish` and :func:`verify`.
    """
    file = directory / MANIFEST
    if not file.is_file():  # reading a pipe may never end
        return None
    try:
        manifest = as_object(parse(file.read_bytes(), file, ValueError), file, ValueError)
        if not all(map(is_inside, manifest["files"])):
            return None
        whole = all((directory / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
        if "sha256" in manifest and seal(manifest) != manifest:  # those of earlier versions have none
            return None
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    except (KeyError, TypeError, AttributeError):  # JSON, but no manifest
        return None
    return manifest if whole else None


def verify(directory: Path) -> dict[str, Any]:
    """Check every byte of a published directory against its manifest, once per process, and return the manifest.

    Raises:
        DataError: the directory is unfinished or a file differs from the manifest.
    """
    try:
        return _read_whole(directory)
    except _Damaged as damage:
        raise DataError(f"{directory}/{damage}: delete the directory and it is built again.") from None


class _Damaged(Exception):
    """A directory is not as it was written: the file, and what is wrong with it."""


def _read_whole(directory: Path) -> dict[str, Any]:
    """Return the manifest of a directory whose every byte is as it was written. Raises _Damaged."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise _Damaged(f"{MANIFEST} or a file's size is not as it was written")
    for name, entry in manifest["files"].items():
        if "sha256" not in entry:
            raise _Damaged(f"{MANIFEST} lists {name} without its SHA-256")
        if (actual := compared_sha256(directory / name, entry["sha256"])) != entry["sha256"]:
            raise _Damaged(f"{name} has SHA-256 {actual}, its manifest says {entry['sha256']}")
    return manifest


def publish(directory: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Build ``directory`` unless it is already there as it was written, and return its manifest.

    A finished directory is read once per process; one that is damaged is built again with a warning.

    Args:
        directory: final place; its name must be a key of the content.
        write: fills an empty temporary directory and returns its facts, stored as ``manifest["facts"]``.

    Raises:
        StorageError: the file system refuses (permissions, space).
    """
    with writing(directory):
        if directory.exists():
            try:
                return _read_whole(directory)
            except _Damaged as damage:
                log.warning("%s is damaged and made again: %s", directory, damage)
        make_shared(directory.parent)
        with unfinished(directory.parent, directory.name) as temporary:
            facts = write(temporary)
            by_umask(temporary)
            manifest = seal({"facts": facts, "files": _describe(temporary)})
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            share_published(temporary)
            _rename(temporary, directory)
    return manifest


def _describe(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }


def _rename(temporary: Path, directory: Path) -> None:
    if directory.exists():
        try:
            _read_whole(directory)
        except _Damaged:
            # A damaged copy holds the name (raymem never renames one there). Move it aside in one step, then remove it.
            doomed = directory.parent / unfinished_name(directory.name)
            directory.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    try:
        temporary.rename(directory)
    except OSError:
        if read_manifest(directory) is None:  # otherwise another process finished the same content first
            raise

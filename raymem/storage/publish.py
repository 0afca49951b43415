"""Publishes directories that appear whole or not at all.

Prepared data and the demo corpus are both directories named by their content. They are written under a temporary
name beside their place, get ``manifest.json`` (sizes and SHA-256 of every file, and the writer's own facts) last, and
are then renamed. Whoever sees the final name therefore sees a finished directory, and two writers of the same content
cannot disturb each other: the second rename fails and its copy is thrown away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raymem.errors import DataError, StorageError

MANIFEST = "manifest.json"
_TEMPORARY = ".writing-"
_ABANDONED_AFTER_SECONDS = 24 * 3600


def digest(value: Any) -> str:
    """Return a hex key (32 digits) of a value of plain JSON types; equal values have equal keys on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished directory, or None where nothing finished is there.

    Finished means that the manifest exists and every file has the size it names, which also notices a download or a
    copy that stopped half-way. Contents are checked by :func:`verify`.
    """
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
        whole = all((directory / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return manifest if whole else None


def verify(directory: Path) -> dict[str, Any]:
    """Check every byte of a published directory against its manifest and return the manifest.

    Raises:
        DataError: the directory is unfinished or a file differs from the manifest.
    """
    cure = "delete the directory and it is built again"
    manifest = read_manifest(directory)
    if manifest is None:
        raise DataError(f"{directory} is no finished data directory (manifest missing or file sizes differ): {cure}.")
    for name, entry in manifest["files"].items():
        if (actual := file_sha256(directory / name)) != entry["sha256"]:
            raise DataError(f"{directory / name} has SHA-256 {actual}, its manifest says {entry['sha256']}: {cure}.")
    return manifest


def publish(directory: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Build ``directory`` unless it is already finished, and return its manifest.

    Args:
        directory: final place; its name must be a key of the content.
        write: fills an empty temporary directory and returns its facts, stored as ``manifest["facts"]``.

    Raises:
        StorageError: the file system refuses (permissions, space).
    """
    if (manifest := read_manifest(directory)) is not None:
        return manifest
    temporary = directory.parent / f"{_TEMPORARY}{directory.name}-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        _remove_abandoned(directory.parent)
        manifest = {"facts": write(temporary), "files": _describe(temporary)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        _rename(temporary, directory)
    except OSError as error:
        raise StorageError(
            f"{directory} cannot be written ({error}): set storage.path to a writable place with free space."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _describe(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }


def _rename(temporary: Path, directory: Path) -> None:
    if directory.exists() and read_manifest(directory) is None:
        # A damaged copy holds the name (raymem never renames one there). Move it aside in one step, then remove it.
        doomed = directory.parent / f"{_TEMPORARY}{directory.name}-{uuid.uuid4().hex}"
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    try:
        temporary.rename(directory)
    except OSError:
        if read_manifest(directory) is None:  # otherwise another process finished the same content first
            raise


def _remove_abandoned(parent: Path) -> None:
    """Remove leftovers of killed runs; a live writer touches its directory far more often than once a day."""
    for path in parent.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - max(item.stat().st_mtime for item in (path, *path.rglob("*"))) > _ABANDONED_AFTER_SECONDS:
                shutil.rmtree(path)

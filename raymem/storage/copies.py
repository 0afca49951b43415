"""Copies a file from storage to storage, and compares copies with what a manifest says of them."""

from __future__ import annotations

import hashlib
from typing import Any

from pyarrow import fs as pafs

from raymem.errors import StorageError
from raymem.storage.inside import is_inside

CHUNK_BYTES = 8 << 20


def copy_file(source: pafs.FileSystem, path: str, target: pafs.FileSystem, to: str) -> dict[str, Any]:
    """Copy one file in chunks; return size and digest of the copy as ``{bytes, sha256}``."""
    digest, size = hashlib.sha256(), 0
    # By default pyarrow unpacks and packs a file whose name ends as an archive's does.
    reader, writer = source.open_input_stream(path, compression=None), target.open_output_stream(to, compression=None)
    with reader, writer:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            writer.write(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def verify_names(directory: str, expected: dict[str, Any], files: list[str]) -> None:
    """Refuse a directory whose files have names that lead out of it, or that lacks a file of its manifest."""
    if odd := [name for name in files if not is_inside(name)]:
        raise StorageError(
            f"{directory} holds a file by the name of {odd[0][:80]!r}, which leads out of it; delete that"
        )
    if missing := sorted(set(expected) - set(files)):
        raise StorageError(f"{directory} is damaged: {missing[0]} is listed but missing; use another one")


def verify(directory: str, expected: dict[str, Any] | None, actual: dict[str, Any]) -> None:
    """Compare size and digest of a copy with those in a manifest. Raises StorageError."""
    for key, value in actual.items():
        if expected is not None and expected.get(key, value) != value:
            raise StorageError(
                f"{directory} is damaged: it has {key} {value}, its manifest says {expected[key]}; use another one"
            )

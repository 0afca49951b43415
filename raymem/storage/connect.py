"""Opens the file system of an object store, with limits on how long a request may take, and copies files to and fro.

By itself Arrow gives up a request to S3 after 3 silent seconds, which a busy store exceeds, and tries it 10 times more
without a word: half a minute and more before anyone hears of an outage; for Google's store it is 15 minutes. Here a
request may take longer, is tried thrice, and :mod:`raymem.storage.retry` does the waiting.
"""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pyarrow import fs as pafs

from raymem.errors import StorageError
from raymem.storage.inside import is_inside
from raymem.storage.retry import check_wanted

CONNECT_TIMEOUT_S, SILENCE_S, TRIES = 5, 15, 3
_GCS_RETRY_S = 10


def connect(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of an ``s3://`` or ``gs://`` URI, and the path in it.

    Raises:
        OSError, ValueError: as Arrow does.
    """
    parts = urlsplit(uri)
    options: dict[str, Any] = dict(parse_qsl(parts.query))
    if parts.scheme != "s3":
        if "retry_limit_seconds" not in options:
            uri = f"{uri}{'&' if parts.query else '?'}retry_limit_seconds={_GCS_RETRY_S}"
        return pafs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    filesystem, root = pafs.FileSystem.from_uri(uri)  # checks the URI and asks for the bucket's region
    truths = {"true": True, "1": True, "false": False, "0": False}
    options = {name: truths.get(value, value) for name, value in options.items()}
    limited = pafs.S3FileSystem(
        **{**options, "region": filesystem.region},
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=SILENCE_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
    )
    return limited, root


CHUNK_BYTES = 8 << 20


def copy_file(source: pafs.FileSystem, path: str, target: pafs.FileSystem, to: str) -> dict[str, Any]:
    """Copy one file in chunks; return size and digest of the copy as ``{bytes, sha256}``."""
    digest, size = hashlib.sha256(), 0
    # By default pyarrow unpacks and packs a file whose name ends as an archive's does.
    reader, writer = source.open_input_stream(path, compression=None), target.open_output_stream(to, compression=None)
    with reader, writer:
        while chunk := reader.read(CHUNK_BYTES):
            check_wanted()
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

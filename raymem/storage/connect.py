"""Opens the file system of an object store, with limits on how long one request may take.

By itself Arrow gives up a request to S3 after 3 silent seconds, which a busy store exceeds, and tries it 10 times more
without a word: half a minute and more before anyone hears of an outage; for Google's store it is 15 minutes. Here a
request may take longer, is tried thrice, and :mod:`raymem.storage.retry` does the waiting.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pyarrow import fs as pafs

_CONNECT_TIMEOUT_S, _SILENCE_S, _TRIES = 5, 15, 3
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
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_SILENCE_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_TRIES),
    )
    return limited, root

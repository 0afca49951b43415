"""Decides whether a path in a recipe is a file of this machine, a URI, or an id of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

PLAIN_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Maps the suffix of a compressed file to the name of its codec in Arrow."""
DATA_SUFFIXES = (
    *PLAIN_SUFFIXES,
    *(plain + packed for packed in COMPRESSIONS for plain in PLAIN_SUFFIXES if plain != ".parquet"),
)
DATA_FILES = f"{', '.join(PLAIN_SUFFIXES)} (all but the last also {' or '.join(COMPRESSIONS)})"
"""The kinds of data files, in words for an error."""


def is_local(path: str, base: str | Path = ".") -> bool:
    """Say whether a path is a file or directory of this machine, existing or not, rather than an id or a URI."""
    if "://" in path:
        return False
    return path.startswith(("/", ".", "~")) or path.endswith(DATA_SUFFIXES) or _joined(path, base).exists()


def absolute(path: str, base: str | Path = ".") -> str:
    """Make a local path absolute and expands ``~``; a URI stays unchanged.

    Ray gives each worker a working directory of its own, so this must happen once, where the command is started.
    """
    return path if "://" in path else os.path.realpath(_joined(path, base))


def _joined(path: str, base: str | Path) -> Path:
    return Path(base) / Path(path).expanduser()

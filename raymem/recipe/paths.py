"""Decides whether a path in a recipe is a file of this machine, a URI, or an id of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from raymem.errors import RecipeError
from raymem.text import shown

TEXT_SUFFIX = ".txt"
PLAIN_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", TEXT_SUFFIX)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Maps the suffix of a compressed file to the name of its codec in Arrow."""
DATA_SUFFIXES = (
    *PLAIN_SUFFIXES,
    *(plain + packed for packed in COMPRESSIONS for plain in PLAIN_SUFFIXES if plain != ".parquet"),
)
DATA_FILES = f"{', '.join(PLAIN_SUFFIXES)} (all but .parquet also {' or '.join(COMPRESSIONS)})"
"""The kinds of data files, in words for an error."""


def is_local(path: str, base: str | Path = ".") -> bool:
    """Say whether a path is a file or directory of this machine, existing or not, rather than an id or a URI."""
    if "://" in path:
        return False
    return path.startswith(("/", ".", "~")) or path.endswith(DATA_SUFFIXES) or _exists(_joined(path, base))


def absolute(path: str, base: str | Path = ".") -> str:
    """Make a local path absolute and expands ``~``; a URI stays unchanged.

    Ray gives each worker a working directory of its own, so this must happen once, where the command is started.
    """
    return path if "://" in path else os.path.realpath(_joined(path, base))


def _joined(path: str, base: str | Path) -> Path:
    if "\0" in path:
        raise RecipeError(f"{shown(path)}: a path cannot hold the character NUL; leave it out")
    try:
        return Path(base) / Path(path).expanduser()
    except RuntimeError:  # ~nosuchuser
        raise RecipeError(f"{shown(path)}: no such user, or one without a home; write the whole path") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long for a file
        return False

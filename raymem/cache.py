"""Keeps plans, calibration and results of probes between runs on this machine. All of it can be made again."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raymem.storage.folders import make_shared
from raymem.storage.json_files import read_object
from raymem.storage.permissions import share
from raymem.storage.publish import seal, unseal

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """RAYMEM_CACHE, or raymem's folder in the user's cache directory."""
    base = os.environ.get("RAYMEM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "raymem")
    return Path(base).expanduser()


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the object in a file; None if it is not there, cannot be read, or is not as it was written."""
    if not os.access(file, os.R_OK):
        return None
    try:
        content = read_object(file, ValueError)
    except ValueError:
        values = None
    else:
        if "sha256" not in content:  # of an earlier version
            return None
        values = unseal(content)
    if values is None:
        log.warning("%s is not as it was written, and is made again", file)
    return values or None


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a file as a whole; one that cannot be written is left out, since all of this can be made again."""
    try:
        make_shared(file.parent, cache_root())
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(seal(value)))
        share(part)
        part.replace(file)
    except OSError:
        return


@functools.cache
def source_digest(*paths: Path) -> str:
    """Digest raymem's own code in files and folders: a development version changes without a number."""
    content = hashlib.sha256()
    for path in paths:
        files = [path] if path.is_file() else sorted([*path.rglob("*.py"), *path.rglob("*.json")])
        for file in files:
            content.update(file.read_bytes())
    return content.hexdigest()


@functools.cache
def versions(*libraries: str) -> dict[str, str | None]:
    """Return the installed version of each library; None if it is not there."""

    def one(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: one(name) for name in libraries}


def key_of(facts: Any) -> str:
    """Name of a file for something that depends on ``facts`` alone."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def remembered(folder: str, facts: Any, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the answer to a question that depends on ``facts`` alone; asked once on this machine.

    Args:
        folder: of the cache, in which the answer is kept.
        ask: gives plain values.
    """
    key = f"{folder}/{key_of(facts)}"
    if key not in _answers:
        file = cache_root() / f"{key}.json"
        answer = read_json(file)
        if answer is None:
            answer = ask()
            write_json(file, answer)
        _answers[key] = answer
    return _answers[key]


_answers: dict[str, dict[str, Any]] = {}

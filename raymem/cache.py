"""The cache of this machine: plans, calibration, results of probes, and what runs on object stores need here.

All of it can be made again. It lies in one directory, RAYMEM_CACHE, and stays within RAYMEM_CACHE_LIMIT bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from raymem.entries import hold, make_room, touch
from raymem.errors import StorageError
from raymem.memory.budget import parse_bytes
from raymem.storage.errors import writing
from raymem.storage.folders import make_shared
from raymem.storage.json_files import read_object
from raymem.storage.permissions import share
from raymem.storage.publish import publish, seal, unseal

log = logging.getLogger(__name__)

T = TypeVar("T")

LIMIT = "RAYMEM_CACHE_LIMIT"
"""The environment variable that names the largest size of the cache."""
DEFAULT_LIMIT = "50GiB"


def cache_root() -> Path:
    """RAYMEM_CACHE, or raymem's folder in the user's cache directory."""
    base = os.environ.get("RAYMEM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "raymem")
    return Path(base).expanduser()


def limit_bytes() -> int:
    """RAYMEM_CACHE_LIMIT, or 50 GiB.

    Raises:
        StorageError: it is no size.
    """
    try:
        return parse_bytes(os.environ.get(LIMIT) or DEFAULT_LIMIT)
    except ValueError as error:
        raise StorageError(f"{LIMIT}: {error}") from None


def publish_entry(directory: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Publish a directory, see :func:`raymem.storage.publish.publish`; one in this machine's cache see :func:`kept`."""
    return kept(directory, lambda: publish(directory, write))


def kept(directory: Path, make: Callable[[], T]) -> T:
    """Make an entry, or find it there as it was made, and use it until this process ends: so long it is not removed.

    Others go where it leaves too little room. A directory outside of the cache is made and nothing more.

    Args:
        make: makes it unless it is there.

    Raises:
        StorageError: RAYMEM_CACHE_LIMIT is no size, or ``make`` raises it.
    """
    if not directory.is_relative_to(cache_root()):
        return make()
    limit, was_there = limit_bytes(), hold(directory)
    value = make()
    while not hold(directory):  # another process has made room in between
        value = make()
    if not was_there:
        make_room(cache_root(), limit)
    return value


@contextlib.contextmanager
def alone(key: str) -> Iterator[None]:
    """Let one process of this machine at a time do what ``key`` names, such as the fetching of one entry.

    Raises:
        StorageError: the cache cannot be written.
    """
    # A few locks for all keys, since a lock's own file cannot be removed while another process may wait for it.
    path = cache_root() / f".lock-{hashlib.sha256(key.encode()).digest()[0] % 64}"
    with writing(path, where="RAYMEM_CACHE"):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: both do it, and one result stays
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


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
    if values:
        touch(file)
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
    make_room(cache_root(), limit_bytes())


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

"""Finds prepared data, and brings it and what else lies in a storage's cache to a node."""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raymem.cache import cache_root, kept
from raymem.errors import DataError, RaymemError
from raymem.storage.errors import writing
from raymem.storage.publish import read_manifest, verify
from raymem.storage.storage import Storage
from raymem.storage.unfinished import unfinished_name
from raymem.training.data.packed.shards import Prepared, PreparedSource

log = logging.getLogger(__name__)

CACHE = "cache"


def cache_dir(storage: Storage) -> Path:
    """Return where prepared data lies as plain files: in the storage itself, or in this machine's cache.

    Raises:
        StorageError: the cache cannot be made.
    """
    if storage.is_local:
        return Path(storage.join(CACHE))
    with writing(root := cache_root(), where="RAYMEM_CACHE"):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return root


def to_dict(prepared: Prepared) -> dict[str, Any]:
    """Return plain data, for a worker's config."""
    return {"key": prepared.key, "sources": [{**asdict(s), "directory": str(s.directory)} for s in prepared.sources]}


def localise(plain: dict[str, Any], storage: Storage) -> Prepared:
    """Invert :func:`to_dict` on a worker's node; what its disk lacks is fetched from the object store.

    Raises:
        StorageError: it cannot be fetched, or a file has another hash than its manifest says.
    """
    here = cache_dir(storage) / "data"  # another node may have another temporary directory
    sources = tuple(PreparedSource(**{**s, "directory": here / Path(s["directory"]).name}) for s in plain["sources"])
    if not storage.is_local:
        for source in sources:
            fetch_entry(f"data/{source.directory.name}", storage)
    return Prepared(plain["key"], sources)


def fetch_entry(name: str, storage: Storage) -> Path:
    """Return the directory of this machine's cache for an entry of an object store's, such as ``data/<key>``.

    What is not here is fetched if it is there; then, and only then, the directory exists.

    Raises:
        StorageError: it cannot be fetched, or a file has another hash than its manifest says.
    """
    local, remote = cache_dir(storage) / name, f"{CACHE}/{name}"
    if local.exists() or storage.exists(f"{remote}/manifest.json"):
        kept(local, lambda: _fetch(storage, remote, local))
    return local


def _fetch(storage: Storage, remote: str, local: Path) -> None:
    """Fetch an entry unless it is here as it was made."""
    if local.exists():
        try:
            verify(local)
            return
        except DataError as damage:
            log.warning("%s It is fetched again.", damage)
            doomed = local.with_name(unfinished_name(local.name))
            with contextlib.suppress(FileNotFoundError):  # another worker of this node was faster
                local.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    try:
        storage.download_dir(remote, local)
    except RaymemError:
        if read_manifest(local) is None:  # another worker of this node may have been faster
            raise

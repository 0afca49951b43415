"""Finds prepared data, and brings it to a worker's node."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from raymem.errors import RaymemError
from raymem.storage.publish import read_manifest
from raymem.storage.remote.copies import node_cache
from raymem.storage.storage import Storage
from raymem.training.data.packed.shards import Prepared, PreparedSource

CACHE = "cache"


def cache_dir(storage: Storage) -> Path:
    """Return where prepared data lies as plain files: in the storage itself, or for an object store on local disk."""
    if storage.is_local:
        return Path(storage.join(CACHE))
    return node_cache()


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
            download_source(source.directory.name, storage)
    return Prepared(plain["key"], sources)


def download_source(key: str, storage: Storage) -> None:
    """Fetch one prepared source from an object store, unless it is here already or not there either.

    Raises:
        StorageError: it cannot be fetched, or a file has another hash than its manifest says.
    """
    local, remote = cache_dir(storage) / "data" / key, f"{CACHE}/data/{key}"
    if read_manifest(local) is not None or not storage.exists(f"{remote}/manifest.json"):
        return
    try:
        storage.download_dir(remote, local)
    except RaymemError:
        if read_manifest(local) is None:  # another worker of this node may have been faster
            raise

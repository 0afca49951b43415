"""Preparing data as Ray tasks, and having it where the workers are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from raymem.errors import RaymemError, StorageError
from raymem.training.data.directories import publish, read_manifest
from raymem.training.data.shards import Counts, Prepared, PreparedSource, Task, prepare, serial, source_keys
from raymem.training.data.tokenizer import load_tokenizer, tokenizer_key
from raymem.training.model import tokenizer_path
from raymem.training.recipe import Recipe
from raymem.training.storage import Storage

CACHE = "cache"


def cache_dir(storage: Storage) -> Path:
    """Where prepared data lies as plain files: in the storage itself, or for an object store on local disk."""
    if storage.is_local:
        return Path(storage.join(CACHE))
    directory = Path(tempfile.gettempdir()) / f"raymem-cache-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise StorageError(f"{directory} belongs to another user; remove it, or set TMPDIR to a directory of your own")
    return directory


def shared_tokenizer(recipe: Recipe, storage: Storage) -> str:
    """Copy the recipe's tokenizer into the cache, so that tasks on every node read the same files.

    Raises:
        ModelError: it cannot be loaded.
    """
    tokenizer = load_tokenizer(tokenizer_path(recipe))
    directory = cache_dir(storage) / "tokenizers" / tokenizer_key(tokenizer)

    def save(target: Path) -> dict[str, Any]:
        tokenizer.save_pretrained(target)
        return {}

    publish(directory, save)
    return str(directory)


def prepare_split(
    recipe: Recipe, split: Literal["train", "eval"], tokenizer: str, storage: Storage, *, on_ray: bool
) -> Prepared:
    """Tokenise and pack a split where that has not been done yet, as Ray tasks if Ray is up.

    With an object store the driver does the work on its own disk and uploads the result, which workers then fetch.

    Raises:
        DataError, ModelError, StorageError: see :func:`raymem.training.data.shards.prepare`.
    """
    cache = cache_dir(storage)
    if storage.is_local:
        return prepare(recipe.data, split, tokenizer, cache, ray_map if on_ray else serial)
    for key in source_keys(recipe.data, split, tokenizer, cache):
        _download(key, storage)
    prepared = prepare(recipe.data, split, tokenizer, cache)
    for source in prepared.sources:
        if not storage.exists(f"{CACHE}/data/{source.directory.name}/manifest.json"):
            storage.upload_dir(source.directory, f"{CACHE}/data/{source.directory.name}")
    return prepared


def to_dict(prepared: Prepared) -> dict[str, Any]:
    """Plain data, for a worker's config."""
    return {"key": prepared.key, "sources": [{**asdict(s), "directory": str(s.directory)} for s in prepared.sources]}


def localise(plain: dict[str, Any], storage: Storage) -> Prepared:
    """The inverse of :func:`to_dict` on a worker's node, fetching from an object store what its disk lacks.

    Raises:
        StorageError: it cannot be fetched, or a file has another hash than its manifest says.
    """
    here = cache_dir(storage) / "data"  # another node may have another temporary directory
    sources = tuple(PreparedSource(**{**s, "directory": here / Path(s["directory"]).name}) for s in plain["sources"])
    if not storage.is_local:
        for source in sources:
            _download(source.directory.name, storage)
    return Prepared(plain["key"], sources)


def _download(key: str, storage: Storage) -> None:
    local, remote = cache_dir(storage) / "data" / key, f"{CACHE}/data/{key}"
    if read_manifest(local) is not None or not storage.exists(f"{remote}/manifest.json"):
        return
    try:
        storage.download_dir(remote, local)
    except RaymemError:
        if read_manifest(local) is None:  # another worker of this node may have been faster
            raise


def ray_map(function: Callable[[Task], Counts], tasks: Sequence[Task]) -> list[Counts]:
    """``map`` with one Ray task per item; a block is written atomically, so a retried task does no harm.

    A single item is done here: a worker would have to start and import for longer than that takes.
    """
    if len(tasks) == 1:
        return serial(function, tasks)
    import ray

    remote = ray.remote(num_cpus=1)(function_of).options(max_retries=3)
    references = [remote.remote(function, task) for task in tasks]
    try:
        return ray.get(references)  # type: ignore[no-any-return]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaymemError):
            raise error.cause from None
        raise


def function_of(function: Callable[[Task], Counts], task: Task) -> Counts:
    """A named function, because Ray cannot make a task of a ``functools.partial``."""
    return function(task)

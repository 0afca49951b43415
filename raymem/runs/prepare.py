"""Tokenising and packing a recipe's data before a run, as Ray tasks where Ray is up."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from raymem.recipe.load import MODELS
from raymem.recipe.schema import Recipe
from raymem.runs import demo
from raymem.storage.publish import digest, publish
from raymem.storage.storage import Storage
from raymem.training.data.shards import MapBlocks, Prepared, prepare, serial, source_keys
from raymem.training.data.shared import CACHE, cache_dir, download_source
from raymem.training.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_key
from raymem.training.model.build import tokenizer_path


def shared_tokenizer(recipe: Recipe, storage: Storage) -> str:
    """Copy the recipe's tokenizer into the cache, so that tasks on every node read the same files.

    Raises:
        ModelError: it cannot be loaded.
    """
    tokenizer = load_tokenizer(tokenizer_path(recipe))
    directory = cache_dir(storage) / "tokenizers" / digest([tokenizer_key(tokenizer), tokenizer.stop_ids])

    def save(target: Path) -> dict[str, Any]:
        save_tokenizer(tokenizer, target)
        return {}

    publish(directory, save)
    return str(directory)


def prepare_here(recipe: Recipe, split: Literal["train", "eval"]) -> tuple[str, Prepared]:
    """The tokenizer's directory and a split of a recipe that is not going to be trained now, prepared in this process.

    Raises:
        DataError, ModelError, StorageError: see :func:`raymem.training.data.shards.prepare`.
    """
    storage = Storage.open(recipe.storage.path)
    storage.check_writable()
    if recipe.model.tokenizer is None and recipe.model.name in MODELS:  # the tokenizer is there before the model
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"tokenizer": "demo"})})
    if recipe.model.tokenizer == "demo":
        model = recipe.model.model_copy(update={"tokenizer": demo.demo_tokenizer(storage)})
        recipe = recipe.model_copy(update={"model": model})
    tokenizer = shared_tokenizer(recipe, storage)
    return tokenizer, prepare_split(recipe, split, tokenizer, storage, on_ray=False)


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
        return prepare(recipe.data, split, tokenizer, cache, _ray_map() if on_ray else serial)
    for key in source_keys(recipe.data, split, tokenizer, cache):
        download_source(key, storage)
    prepared = prepare(recipe.data, split, tokenizer, cache)
    for source in prepared.sources:
        if not storage.exists(f"{CACHE}/data/{source.directory.name}/manifest.json"):
            storage.upload_dir(source.directory, f"{CACHE}/data/{source.directory.name}")
    return prepared


def _ray_map() -> MapBlocks:
    from raymem.cluster.tasks import ray_map

    return ray_map

"""Makes the demo models: small Llamas that this machine pre-trains on its own standard library, once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raymem.errors import ModelError, StorageError
from raymem.recipe.load import MODELS, packaged_recipe, parse_recipe, read_yaml
from raymem.recipe.schema import Recipe
from raymem.storage.folders import make_shared, share_published
from raymem.storage.publish import digest
from raymem.storage.storage import Storage
from raymem.training.artifacts.facts import FACTS
from raymem.training.checkpoint import FOLDER
from raymem.training.data.demo import ensure_demo
from raymem.training.data.packed.shared import cache_dir


def demo_tokenizer(storage: Storage) -> str:
    """Return the directory of the demo tokenizer, which is built if missing."""
    return str(ensure_demo(cache_dir(storage)).tokenizer)


def with_demo_tokenizer(recipe: Recipe, storage: Storage) -> Recipe:
    """Put the directory of the demo tokenizer into a recipe that uses it; the model need not be built for that."""
    model = recipe.model
    if model.tokenizer != "demo" and (model.tokenizer is not None or model.name not in MODELS):
        return recipe
    return recipe.model_copy(update={"model": model.model_copy(update={"tokenizer": demo_tokenizer(storage)})})


def pretraining_recipe(name: str, storage: Storage) -> Recipe:
    """Return the recipe that makes demo model ``name``, as a run inside the storage's cache named by its content."""
    raw: dict[str, Any] = read_yaml(packaged_recipe(MODELS[name]))
    demo = ensure_demo(cache_dir(storage))
    raw["model"]["tokenizer"] = str(demo.tokenizer)
    key = digest([{k: raw[k] for k in ("model", "data", "train", "optimizer") if k in raw}, demo.directory.name])
    raw |= {"name": f"{name}-{key[:12]}", "tracking": "none"}
    raw["storage"] = {"path": str(cache_dir(storage) / "models"), "num_to_keep": 1}
    raw["scaling"] = {"num_workers": 0}
    return parse_recipe(raw, where=f"packaged recipe {MODELS[name]}")


def finished_model(recipe: Recipe) -> str | None:
    """Return the directory of the model that a pre-training recipe made, or None if it is not finished."""
    run = recipe.storage.open().child(recipe.name)
    return run.join("model") if run.exists(f"model/{FACTS}") else None


def discard_checkpoints(recipe: Recipe) -> None:
    """Delete the checkpoints of a finished demo model: it is only read, and they are ten times its size."""
    with contextlib.suppress(StorageError):
        recipe.storage.open().child(recipe.name).delete_dir(FOLDER, last=None)


def resolve_demo(recipe: Recipe, storage: Storage, build: Callable[[Recipe], object] | None = None) -> Recipe:
    """Replace the names ``demo`` and ``demo-long`` by directories.

    Args:
        build: trains a pre-training recipe; with it ``demo`` is built on the way (two minutes).

    Raises:
        ModelError: the model is not built yet, or the storage is an object store.
    """
    model = recipe.model
    updates: dict[str, str | None] = {}
    if not storage.is_local and ({model.name, model.tokenizer} & {*MODELS}):
        raise ModelError(
            f"model: {model.name or model.tokenizer} is made on this machine and needs a local storage.path, not "
            f"{storage.path}; give a directory or a Hugging Face id"
        )
    if model.tokenizer == "demo":
        updates["tokenizer"] = demo_tokenizer(storage)
    if model.name in MODELS:
        pretraining = pretraining_recipe(model.name, storage)
        directory = finished_model(pretraining)
        if directory is None and model.name == "demo" and build is not None:
            make_shared(Path(pretraining.storage.path))
            build(pretraining)
            discard_checkpoints(pretraining)
            directory = finished_model(pretraining)
            share_published(Path(pretraining.storage.path, pretraining.name))
        if directory is None:
            raise ModelError(
                f"model.name: {model.name} is not built yet in {storage.path}; build it with: "
                f"python benchmarks/make_base.py --model {model.name} --storage {storage.path}"
            )
        updates["name"] = directory
    return recipe.model_copy(update={"model": model.model_copy(update=updates)}) if updates else recipe

"""Prepares the data of a resolved run: checks them against its model, tokenises and packs them on its backend."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from raymem.cache import publish_entry
from raymem.errors import ModelError, StorageError
from raymem.recipe.data import DataSection
from raymem.runs.backend import Backend
from raymem.runs.resolved import ResolvedRun
from raymem.storage.checksums import check_files
from raymem.storage.publish import digest
from raymem.storage.storage import Storage
from raymem.training.data.packed import shards
from raymem.training.data.packed.shards import Prepared, source_keys
from raymem.training.data.packed.shared import CACHE, cache_dir, download_source
from raymem.training.data.summary import overview
from raymem.training.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_key
from raymem.training.job import PreparedRun
from raymem.training.model.build import build_model, check_fit
from raymem.training.model.check import check_weights_here
from raymem.training.model.summary import what_is_trained
from raymem.training.reporter import Status

log = logging.getLogger(__name__)

Split = Literal["train", "eval"]


def prepare(run: ResolvedRun, *, train_data: Prepared | None = None, status: Status) -> PreparedRun:
    """Check the model and prepare the data, so that mistakes show before workers start.

    Args:
        train_data: where the caller has prepared it already.

    Raises:
        ModelError: the base has to be pruned first, its weights are of no use, or model and tokenizer do not belong
            together.
        RecipeError: rows that the model cannot take.
        DataError, StorageError: see :func:`prepare_data`.
    """
    run.require_base()
    if (note := run.recipe.model.code_note) is not None:
        status(note)
    status("checking the model")
    check_weights_here(run.recipe)
    model = build_model(run.recipe, meta=True)
    check_fit(model, load_tokenizer(run.tokenizer), run.recipe)
    for line in what_is_trained(model, run.recipe):
        status(str(line))
    del model
    status("preparing the data")
    prepared_before, train_data = train_data is not None, train_data or prepare_split(run, "train")
    eval_data = None if run.recipe.data.eval is None else prepare_split(run, "eval")
    if not prepared_before:
        status(overview(run.recipe.data.train, train_data, load_tokenizer(run.tokenizer)))
    return PreparedRun(run.recipe, run.storage, run.run, train_data, eval_data)


def prepare_split(run: ResolvedRun, split: Split) -> Prepared:
    """Prepare one split of a run's data; see :func:`prepare_data`."""
    return prepare_data(run.recipe.data, split, run.tokenizer, run.storage, run.backend)


def prepare_data(section: DataSection, split: Split, tokenizer: str, storage: Storage, backend: Backend) -> Prepared:
    """Tokenise and pack a split where that has not been done yet, block by block on the backend.

    With an object store the driver does the work on its own disk and uploads the result, which workers then fetch.

    Args:
        tokenizer: its directory.

    Raises:
        DataError, ModelError, StorageError: see :func:`raymem.training.data.packed.shards.prepare`.
    """
    cache = cache_dir(storage)
    if storage.is_local:
        return shards.prepare(section, split, tokenizer, cache, backend.map)
    damaged: set[str] = set()
    for key in source_keys(section, split, tokenizer, cache):
        try:
            download_source(key, storage)
        except StorageError as error:  # an outage, too, only costs the work: what is uploaded below is the same
            log.warning("%s; the data are made again", error)
            damaged.add(key)
    prepared = shards.prepare(section, split, tokenizer, cache)
    for source in prepared.sources:
        key = source.directory.name
        if key in damaged or not storage.exists(f"{CACHE}/data/{key}/manifest.json"):
            storage.upload_dir(source.directory, f"{CACHE}/data/{key}")
    return prepared


def share_tokenizer(source: str, storage: Storage) -> str:
    """Copy a tokenizer into the cache, so that tasks on every node read the same files; returns the directory there.

    Args:
        source: directory or Hugging Face id.

    Raises:
        ModelError: it cannot be loaded.
    """
    check_files(source, ModelError, weights=False)
    tokenizer = load_tokenizer(source)
    directory = cache_dir(storage) / "tokenizers" / digest([tokenizer_key(tokenizer), tokenizer.stop_ids, source])

    def save(target: Path) -> dict[str, Any]:
        save_tokenizer(tokenizer, target)
        return {}

    publish_entry(directory, save)
    return str(directory)

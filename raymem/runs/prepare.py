"""Prepares the data of a resolved run: checks them against its model, tokenises and packs them on its backend."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Literal

from raymem.cache import publish_entry
from raymem.errors import ModelError, StorageError, TransientStorageError
from raymem.recipe.data import DataSection
from raymem.runs.backend import Backend, Progress
from raymem.runs.resolved import ResolvedRun
from raymem.storage.checksums import check_files
from raymem.storage.publish import digest
from raymem.storage.storage import MARKER, Storage
from raymem.training.data.packed import shards
from raymem.training.data.packed.shards import Prepared
from raymem.training.data.packed.shared import CACHE, cache_dir, fetch_entry
from raymem.training.data.sources.index import IndexFiles, index_here
from raymem.training.data.summary import overview
from raymem.training.data.tasks.index import index_on_nodes
from raymem.training.data.tasks.shards import Sharding
from raymem.training.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_key
from raymem.training.job import PreparedRun, StepJob
from raymem.training.model.build import build_model, check_fit
from raymem.training.model.check import check_weights_here
from raymem.training.model.summary import what_is_trained
from raymem.training.reporter import Status, unheard

log = logging.getLogger(__name__)

Split = Literal["train", "eval"]
_TOLD_EVERY_S = 15.0


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
    prepared_before, train_data = train_data is not None, train_data or prepare_split(run, "train", status)
    eval_data = None if run.recipe.data.eval is None else prepare_split(run, "eval", status)
    if not prepared_before:
        status(overview(run.recipe.data.train, train_data, load_tokenizer(run.tokenizer)))
    return PreparedRun(run.recipe, run.storage, run.run, train_data, eval_data)


def prepare_split(run: ResolvedRun, split: Split, status: Status = unheard) -> Prepared:
    """Prepare one split of a run's data; see :func:`prepare_data`."""
    return prepare_data(run.recipe.data, split, run.tokenizer, run.storage, run.backend, status)


def prepare_data(
    section: DataSection, split: Split, tokenizer: str, storage: Storage, backend: Backend, status: Status = unheard
) -> Prepared:
    """Tokenise and pack a split where that has not been done yet, block by block on the backend.

    With an object store, what every node can read (files on object stores, data sets of the hub) is made by whoever
    does the backend's steps, straight into the store; of a file that only this machine may have, this process makes
    rows on its own disk and uploads them. Every node that needs rows fetches them.

    Args:
        tokenizer: its directory.
        status: told how far it is.

    Raises:
        DataError, ModelError, StorageError: see :func:`raymem.training.data.packed.shards.prepare`.
        ClusterError: a node was lost again and again.
    """
    cache = cache_dir(storage)
    if storage.is_local:
        return shards.prepare(section, split, tokenizer, cache, backend.map)
    index = index_of(section, storage, backend, status)
    plans = shards.plan_sources(section, split, tokenizer, cache, index)
    damaged = {plan.key for plan in plans if not _fetched(plan.key, storage)}
    missing = [plan for plan in plans if not (cache / "data" / plan.key).exists() and plan.is_everywhere]
    if missing:
        for key in damaged & {plan.key for plan in missing}:
            storage.delete_dir(f"{CACHE}/data/{key}")
        job = Sharding(storage, missing, section.max_example_bytes)
        job.begin()
        backend.run_steps(job, _progress(job.what, status))
        for plan in missing:
            fetch_entry(f"data/{plan.key}", storage)
    prepared = shards.prepare_planned(plans, section, split, cache, index)
    for source in prepared.sources:
        key = source.directory.name
        if key in damaged - {plan.key for plan in missing} or not storage.exists(f"{CACHE}/data/{key}/{MARKER}"):
            storage.upload_dir(source.directory, f"{CACHE}/data/{key}")
    return prepared


def index_of(section: DataSection, storage: Storage, backend: Backend, status: Status = unheard) -> IndexFiles:
    """Return the function that indexes source files where they can be read; see :func:`prepare_data`."""
    here = index_here(cache_dir(storage), shards.BLOCK_ROWS, section.max_example_bytes)
    if storage.is_local:
        return here

    def run_steps(job: StepJob) -> None:
        backend.run_steps(job, _progress(job.what, status))

    return index_on_nodes(storage, run_steps, here, shards.BLOCK_ROWS, section.max_example_bytes)


def _fetched(key: str, storage: Storage) -> bool:
    """Fetch prepared data where there are any; False, after a warning, if they cannot be used."""
    try:
        fetch_entry(f"data/{key}", storage)
    except TransientStorageError:
        raise
    except StorageError as error:
        log.warning("%s; the data are made again", error)
        return False
    return True


def _progress(what: str, status: Status) -> Progress:
    """Return what tells a status now and then how far a job is."""
    told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _TOLD_EVERY_S and done < total:
            told = time.monotonic()
            status(f"{what}: {done} of {total} parts are done")

    return progress


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

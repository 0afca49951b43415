"""Finds the pruned model of a recipe by its content, so that no recipe has to name it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from raymem.errors import ModelError
from raymem.methods.loram.config import LoRAMOptions
from raymem.methods.loram.manifest import MANIFEST, check_base, read_manifest
from raymem.methods.loram.pruning.job import job_key
from raymem.methods.loram.source import Source, open_source
from raymem.recipe.data import DataSection
from raymem.recipe.data import Source as DataSource
from raymem.recipe.schema import Recipe
from raymem.runs.backend import Backend
from raymem.runs.loram.calibration_texts import calibration_ids
from raymem.runs.loram.models import PrunedModel, PruningSite
from raymem.runs.prepare import prepare_data, share_tokenizer
from raymem.storage.publish import digest
from raymem.storage.remote.files import HUB, directory_at
from raymem.storage.storage import Storage
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shared import CACHE
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import fetch, tokenizer_path


def find_site(recipe: Recipe, storage: Storage, backend: Backend) -> PruningSite:
    """Open the full model and prepare the calibration texts; nothing is pruned.

    Args:
        recipe: with ``base.kind: loram``, and the directory or the commit of its model.

    Raises:
        ModelError: the model cannot be had, or LoRAM does not know its architecture.
        DataError: the calibration texts cannot be read, or are too few.
    """
    options: LoRAMOptions = recipe.base
    source = open_full_model(recipe)
    if not storage.is_local and source.revision is not None:  # tasks on other nodes fetch what they need themselves
        source = dataclasses.replace(source, weights=f"{HUB}{source.name}@{source.revision}")
    ids = None
    if options.pruning.needs_calibration:
        tokenizer = share_tokenizer(tokenizer_path(recipe), storage)
        prepared = prepare_data(_calibration_data(recipe, options), "train", tokenizer, storage, backend)
        rows = PackedRows(prepared.directories)
        ids = calibration_ids(rows, options.calibration_texts, options.calibration_length, options.seed)
    # The name too: recovered adapters say that they are for it.
    key = digest([job_key(source, options.pruning, ids), source.name, source.revision])
    name = f"{CACHE}/loram/{key}"
    return PruningSite(source, ids, name, storage.join(name))


def open_full_model(recipe: Recipe) -> Source:
    """Open the recipe's full model; the weights of one on an object store are read there.

    Raises:
        ModelError: it cannot be had, is damaged, or of an architecture that LoRAM does not know.
    """
    name = recipe.model.name or ""
    remote = "://" in name
    directory = fetch(name, recipe.model.revision, DistEnv(), weights_too=not remote)
    if remote:
        return open_source(directory, name, weights=name)
    if Path(name).is_dir():
        return open_source(directory)
    return open_source(directory, name, recipe.model.revision)


def is_made(location: str) -> bool:
    """Say whether a pruned model is there, whole.

    Raises:
        StorageError: that cannot be known.
    """
    return bool((directory_at(location) / MANIFEST).is_file())


def made_model(location: str, source: Source | None, site: PruningSite | None) -> PrunedModel:
    """Open a pruned model that is there.

    Raises:
        ModelError: it is none.
        StorageError: it cannot be read.
    """
    directory = fetch(location, None, DistEnv(), weights_too=False)
    manifest = read_manifest(directory, with_weights="://" not in location)
    return PrunedModel(location, directory, manifest, source, site)


def named_model(recipe: Recipe, artifact: str) -> PrunedModel:
    """Open the pruned model that a recipe names, which must have been pruned from the recipe's model.

    The full weights of a Hugging Face id need not be on this machine; others are held against it.

    Raises:
        ModelError: it is no pruned model, or was pruned from another one.
    """
    pruned, name = made_model(artifact, None, None), recipe.model.name or ""
    manifest = pruned.manifest
    if Path(name).is_dir() or "://" in name:
        source = open_full_model(recipe)
        check_base(manifest, source)
        return dataclasses.replace(pruned, source=source)
    pruned_from = (manifest.source["name"], manifest.source["revision"])
    if pruned_from != (name, recipe.model.revision or manifest.source["revision"]):
        raise ModelError(
            f"base.artifact: {artifact} was pruned from {manifest.source['name']} at revision "
            f"{manifest.source['revision']}, not from {name}; set model.name to that, or prune again"
        )
    return pruned


def _calibration_data(recipe: Recipe, options: LoRAMOptions) -> DataSection:
    """Return a data section whose training split is the calibration texts."""
    if options.calibration is None:
        return recipe.data
    length = max(8, options.calibration_length)
    return DataSection(train=[DataSource(path=options.calibration)], sequence_length=length, packing="wrapped")

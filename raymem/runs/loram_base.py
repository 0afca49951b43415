"""Where the pruned model of a recipe lies: found by what it is made of, so that no recipe has to name it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from raymem.errors import ModelError
from raymem.methods.loram.config import LoRAMOptions
from raymem.methods.loram.job import job_key
from raymem.methods.loram.manifest import MANIFEST, Manifest, check_base, read_manifest
from raymem.methods.loram.source import Source, open_source
from raymem.recipe.data import DataSection
from raymem.recipe.data import Source as DataSource
from raymem.recipe.load import alignment
from raymem.recipe.schema import Recipe
from raymem.runs import demo
from raymem.runs.prepare import prepare_split, shared_tokenizer
from raymem.storage.publish import digest
from raymem.storage.storage import Storage
from raymem.training.calibration import calibration_ids
from raymem.training.data.dataset import PackedRows
from raymem.training.data.shared import cache_dir
from raymem.training.dist_env import Layout
from raymem.training.job import Ready
from raymem.training.model.build import fetch


@dataclass(frozen=True)
class Place:
    """What a recipe with ``base.kind: loram`` is pruned from, and where that lies once it is done."""

    recipe: Recipe
    """Demo names replaced by directories, the revision pinned."""
    source: Source
    """The full model."""
    calibration: torch.Tensor | None
    pruned: Path
    """Directory of the pruned model."""


def find(recipe: Recipe, storage: Storage, *, on_ray: bool) -> Place:
    """Open the full model and prepare the calibration texts; nothing is pruned. Expects the revision to be resolved.

    Raises:
        ModelError: the model cannot be had, or LoRAM does not know its architecture.
        DataError: the calibration texts cannot be read, or are too few.
    """
    base = recipe.base
    assert isinstance(base, LoRAMOptions) and base.artifact is None
    recipe = demo.resolve(recipe, storage)
    source = full_source(recipe)
    ids = None
    if base.pruning.needs_calibration:
        tokenizer = shared_tokenizer(recipe, storage)
        prepared = prepare_split(_calibrating(recipe, base), "train", tokenizer, storage, on_ray=on_ray)
        rows = PackedRows(prepared.directories)
        ids = calibration_ids(rows, base.calibration_texts, base.calibration_length, base.seed)
    # The name too: it is what recovered adapters say that they are for.
    key = digest([job_key(source, base.pruning, ids), source.name, source.revision])
    return Place(recipe, source, ids, cache_dir(storage) / "loram" / key)


def full_source(recipe: Recipe) -> Source:
    """The recipe's full model with its weights, opened.

    Raises:
        ModelError: it cannot be had, is damaged, or of an architecture that LoRAM does not know.
    """
    name = recipe.model.name or ""
    directory = fetch(name, recipe.model.revision, Layout(), weights_too=True)
    if Path(name).is_dir():
        return open_source(directory)
    return open_source(directory, name, recipe.model.revision)


def settled(recipe: Recipe, storage: Storage, *, on_ray: bool) -> Recipe:
    """The recipe with the directory of its pruned (and, if it says so, aligned) model as ``base.artifact``.

    Recipes with another base are returned as they are. Expects demo names and revision to be resolved.

    Raises:
        ModelError: not pruned or aligned yet, with the command that does it; or pruned from another base.
    """
    base = recipe.base
    if not isinstance(base, LoRAMOptions):
        return recipe
    if base.artifact is not None:
        check_artifact(recipe, base.artifact)
        return recipe
    return with_artifact(recipe, pruned_model(find(recipe, storage, on_ray=on_ray), storage, on_ray=on_ray))


def pruned_model(place: Place, storage: Storage, *, on_ray: bool) -> Path:
    """Directory of the pruned model to train on, which is the aligned one if the recipe says so.

    Raises:
        ModelError: not pruned or aligned yet, with the command that does it.
    """
    if not (place.pruned / MANIFEST).is_file():
        raise ModelError(
            f"base.kind: loram: {place.recipe.model.name} is not pruned with these options yet in {storage.path}; run: "
            "raymem loram prune RECIPE"
        )
    aligning = alignment_run(place, storage, read_manifest(place.pruned), on_ray=on_ray)
    if aligning is None:
        return place.pruned
    aligned = aligned_model(aligning[0], storage)
    if not (aligned / MANIFEST).is_file():
        raise ModelError(
            f"base.align: the pruned model {place.pruned} is not aligned yet; run: raymem loram align RECIPE"
        )
    return aligned


def with_artifact(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe as it is trained on a pruned model."""
    assert isinstance(recipe.base, LoRAMOptions)
    base = LoRAMOptions(artifact=str(directory), quantize=recipe.base.quantize)
    return recipe.model_copy(update={"base": base})


def alignment_run(
    place: Place, storage: Storage, manifest: Manifest, *, on_ray: bool
) -> tuple[Recipe, Ready] | None:  # fmt: skip
    """The run that aligns a pruned model, named by its content, and its data; None if the recipe has none.

    Raises:
        RecipeError, DataError: its sections are no recipe, or its data cannot be read.
    """
    model = {**place.recipe.to_dict()["model"], "name": str(place.pruned), "revision": None}
    run = alignment(place.recipe, model=model, name="loram-aligned")
    if run is None:
        return None
    tokenizer = shared_tokenizer(run, storage)
    prepared = prepare_split(run, "train", tokenizer, storage, on_ray=on_ray)
    values = run.to_dict()
    what = {name: values[name] for name in ("seed", "adapter", "activations", "optimizer", "train")}
    key = digest([manifest.digest, prepared.key, what])
    return run.model_copy(update={"name": f"loram-aligned-{key[:16]}"}), Ready(None, tokenizer, prepared)


def aligned_model(run: Recipe, storage: Storage) -> Path:
    """Directory of the model that an alignment leaves."""
    return Path(storage.join(run.name, "model"))


def check_artifact(recipe: Recipe, artifact: str, source: Source | None = None) -> Manifest:
    """Refuse a pruned model of another base than the recipe's.

    Args:
        source: the recipe's full model, if it is open.

    Raises:
        ModelError: it is no pruned model, or was pruned from another one.
    """
    manifest, name = read_manifest(artifact), recipe.model.name or ""
    if Path(name).is_dir():
        check_base(manifest, source or open_source(name))
    elif (manifest.source["name"], manifest.source["revision"]) != (
        name,
        recipe.model.revision or manifest.source["revision"],
    ):
        raise ModelError(
            f"base.artifact: {artifact} was pruned from {manifest.source['name']} at revision "
            f"{manifest.source['revision']}, not from {name}; set model.name to that, or prune again"
        )
    return manifest


def _calibrating(recipe: Recipe, base: LoRAMOptions) -> Recipe:
    """The recipe whose training data are the calibration texts."""
    if base.calibration is None:
        return recipe
    length = max(8, base.calibration_length)
    section = DataSection(train=[DataSource(path=base.calibration)], sequence_length=length, packing="wrapped")
    return recipe.model_copy(update={"data": section})

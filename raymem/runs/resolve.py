"""Turns a recipe into a run of which nothing is left open.

Revision, micro-batch, demo models, pruned base and tokenizer are decided here, in this order, and nowhere else; every
command and every stage takes the :class:`ResolvedRun` from here on.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path

from raymem.errors import ModelError
from raymem.planner import choose_micro_batch
from raymem.recipe.axes import BASES, full_base
from raymem.recipe.load import alignment
from raymem.recipe.schema import Recipe
from raymem.runs.backend import Backend, backend_of
from raymem.runs.demo import resolve_demo, with_demo_tokenizer
from raymem.runs.loram.base import find_site, is_made, made_model, named_model
from raymem.runs.loram.models import Alignment, PlannedModel, PrunedModel, PruningSite
from raymem.runs.prepare import prepare_data, share_tokenizer
from raymem.runs.resolved import Base, FullModel, ResolvedRun
from raymem.storage.identity import identify
from raymem.storage.publish import digest
from raymem.storage.storage import Storage
from raymem.training.data.packed.shared import cache_dir
from raymem.training.model import smollm2
from raymem.training.model.build import load_config, tokenizer_path
from raymem.training.model.revision import (
    Began,
    at_revision,
    began_with,
    on_hub,
    record,
    resolve_revision,
    trained_from,
)
from raymem.training.reporter import Status
from raymem.versions import warn_of_newer

log = logging.getLogger(__name__)

BuildDemo = Callable[[Recipe], object]
"""A function that trains the recipe of a demo model."""


def resolve(
    recipe: Recipe,
    *,
    fresh: bool = False,
    artifact: str | None = None,
    build_demo: BuildDemo | None = None,
    status: Status = log.info,
) -> ResolvedRun:
    """Decide all that a recipe leaves open, and connect to where its work is done. Nothing of the run is written.

    Args:
        fresh: take the model as the hub has it today, whatever an earlier run of this name began with.
        artifact: is to be evaluated: the model is then at the revision that it was trained on.
        build_demo: with it the model ``demo`` is made on the way (two minutes).
        status: told what takes time.

    Raises:
        ModelError: the model, its revision, its tokenizer or the pruned model that the recipe names cannot be had.
        RecipeError: ``micro_batch: auto`` without a budget, or options that the model does not take.
        DataError: calibration texts cannot be read, or are too few.
        ClusterError, StorageError: see :meth:`raymem.runs.backend.Backend.connect`.
    """
    warn_of_newer()
    storage = recipe.storage.open()
    _identify(storage)
    run = storage.child(recipe.name)
    at_hand = _with_smollm2(recipe, storage, status)
    if artifact is None:
        pinned = resolve_revision(at_hand, None if fresh else began_with(run))
    else:
        pinned = _as_trained(at_hand, artifact, run)
    backend = backend_of(recipe.scaling)
    backend.connect(storage, status)
    settled = choose_micro_batch(pinned, status=status)
    asked = settled.model_copy(update={"model": recipe.model})
    kind = BASES.of(settled)
    if artifact is not None and kind.replaces_model and kind.is_of_model(artifact):
        settled = settled.model_copy(update={"base": full_base()})
    named = resolve_demo(settled, storage, build_demo)
    located, base = _locate(named, storage, backend, status)
    load_config(located)  # a model that cannot be loaded is refused before its tokenizer
    tokenizer = share_tokenizer(tokenizer_path(located), storage)
    return ResolvedRun(located, base, tokenizer, storage, run, backend, asked)


def resolve_shared(
    recipe: Recipe, began: Began | None, storage: Storage, build_demo: BuildDemo, status: Status
) -> tuple[Recipe, Recipe, str]:
    """Return for a sweep the recipe at its revision, the same with directories for demo models, and its tokenizer.

    Micro-batch and base are left to the trials, which resolve their own points.

    Args:
        began: what the sweep began with, if it goes on.

    Raises:
        ModelError: the model, its revision or its tokenizer cannot be had.
    """
    pinned = resolve_revision(_with_smollm2(recipe, storage, status), began)
    named = resolve_demo(pinned, storage, build_demo)
    return pinned, named, share_tokenizer(tokenizer_path(named), storage)


def resolve_tokenizer(recipe: Recipe, storage: Storage) -> str:
    """Return a recipe's tokenizer in the cache, for callers that only look at data: no model is built or opened.

    Raises:
        ModelError: the model, its revision or its tokenizer cannot be had.
    """
    _identify(storage)
    pinned = resolve_revision(_with_smollm2(recipe, storage, log.info), began_with(storage.child(recipe.name)))
    return share_tokenizer(tokenizer_path(with_demo_tokenizer(pinned, storage)), storage)


def resolve_micro_batch(
    recipe: Recipe, *, budget_bytes: int | None = None, gpu: str | None = None, status: Status = log.info
) -> Recipe:
    """Return the recipe with a number as its micro-batch; see :func:`raymem.planner.choose_micro_batch`."""
    return choose_micro_batch(recipe, budget_bytes=budget_bytes, gpu=gpu, status=status)


def locate_again(run: ResolvedRun, status: Status = log.info) -> ResolvedRun:
    """Return the run after a stage that pruned or aligned its base; the full model is not opened a second time."""
    if not isinstance(run.base, PlannedModel):
        return run
    recipe = run.recipe.model_copy(update={"base": run.asked.base})
    located, base = _at_site(recipe, run.base.site, run.storage, run.backend, status)
    return dataclasses.replace(run, recipe=located, base=base)


def on_full_model(run: ResolvedRun, name: str) -> ResolvedRun:
    """Return a run called ``name`` that does on the full model what the given one does on the pruned one.

    Raises:
        ModelError: the commit that was pruned cannot be had.
    """
    base, changes = run.base, {"base": full_base(), "name": name}
    recipe = run.recipe.model_copy(update=changes)
    if isinstance(base, PrunedModel) and on_hub(recipe.model):
        commit = base.manifest.source["revision"]
        recipe = resolve_revision(recipe, Began(base.manifest.source["name"], commit, commit))
    asked = run.asked.model_copy(update=changes)
    return dataclasses.replace(run, recipe=recipe, base=FullModel(), run=run.storage.child(name), asked=asked)


def note_start(run: ResolvedRun) -> None:
    """Write down which revision a run begins with, for its artefacts and later commands.

    Raises:
        StorageError: it cannot be written.
    """
    record(run.run, run.recipe, run.asked.model.revision)


def planned_recipes(run: ResolvedRun) -> tuple[Recipe, Recipe]:
    """Return the run's recipe for the planner: at its commit, and as ``raymem plan``, which resolves none, has it."""
    return at_revision(run.asked, run.recipe.model.revision), run.asked


def _identify(storage: Storage) -> None:
    """Give a new storage its id, by which what is made there is shared; a command that only reads need not be able."""
    if storage.is_local and (not storage.exists("") or os.access(storage.root, os.W_OK)):
        identify(Path(storage.root))


def _with_smollm2(recipe: Recipe, storage: Storage, status: Status) -> Recipe:
    """Return the recipe with a Hugging Face id or a directory in place of ``smollm2``."""
    model = smollm2.located(recipe.model, cache_dir(storage) if storage.is_local else None, status)
    return recipe if model is recipe.model else recipe.model_copy(update={"model": model})


def _as_trained(recipe: Recipe, artifact: str, run: Storage) -> Recipe:
    """Return the recipe at the revision that an artefact was trained on; for the model without an adapter, the run's.

    Raises:
        ModelError: the recipe names another revision than the artefact was trained on.
    """
    if not on_hub(recipe.model):
        return recipe
    trained = None if artifact == "base" else trained_from(artifact, recipe.model.name)
    if trained is not None and trained.is_meant_by(recipe.model):
        return resolve_revision(recipe, trained)
    resolved = resolve_revision(recipe, began_with(run))
    if trained is not None:  # others may have named a branch when they trained it
        same = resolve_revision(at_revision(recipe, trained.commit)).model.revision
        if same != resolved.model.revision:
            raise ModelError(
                f"model.revision: {recipe.model.revision} is commit {resolved.model.revision} of {recipe.model.name}, "
                f"but {artifact} was trained on {trained.commit}; leave it out, or name that commit"
            )
    return resolved


def _locate(recipe: Recipe, storage: Storage, backend: Backend, status: Status) -> tuple[Recipe, Base]:
    """Return the base that is trained on, and the recipe that names it."""
    kind = BASES.of(recipe)
    if not kind.is_planned(recipe.base):
        directory = kind.directory(recipe.base)
        return recipe, FullModel() if directory is None else named_model(recipe, directory)
    status("opening the full model")
    return _at_site(recipe, find_site(recipe, storage, backend), storage, backend, status)


def _at_site(
    recipe: Recipe, site: PruningSite, storage: Storage, backend: Backend, status: Status
) -> tuple[Recipe, Base]:  # fmt: skip
    """Return the model that pruning and alignment have left so far."""
    if not is_made(site.location):
        missing = (
            f"base.kind: loram: {recipe.model.name} is not pruned with these options yet in {storage.path}; run: "
            "raymem loram prune RECIPE"
        )
        return recipe, PlannedModel(site, missing)
    if site.alignment is None:
        site = dataclasses.replace(site, alignment=_alignment(recipe, site.location, storage, backend, status))
    location = site.location if site.alignment is None else site.alignment.model
    if not is_made(location):
        missing = f"base.align: the pruned model {site.location} is not aligned yet; run: raymem loram align RECIPE"
        return recipe, PlannedModel(site, missing)
    named = recipe.model_copy(update={"base": BASES.of(recipe).located(recipe.base, location)})
    return named, made_model(location, site.source, site)


def _alignment(
    recipe: Recipe, pruned: str, storage: Storage, backend: Backend, status: Status
) -> Alignment | None:  # fmt: skip
    """Return the run that aligns a pruned model, named by its content, and its data; None if the recipe has none.

    Raises:
        RecipeError, DataError: its sections are no recipe, or its data cannot be read.
    """
    model = {**recipe.to_dict()["model"], "name": pruned, "revision": None}
    aligning = alignment(recipe, model=model, name="loram-aligned")
    if aligning is None:
        return None
    tokenizer = share_tokenizer(tokenizer_path(aligning), storage)
    train_data = prepare_data(aligning.data, "train", tokenizer, storage, backend, status)
    values = aligning.to_dict()
    sections = {name: values[name] for name in ("seed", "adapter", "activations", "optimizer", "train")}
    name = f"loram-aligned-{digest([made_model(pruned, None, None).manifest.digest, train_data.key, sections])[:16]}"
    settled = choose_micro_batch(aligning.model_copy(update={"name": name}), status=status)
    if aligning.scaling != recipe.scaling:
        backend = backend_of(aligning.scaling)  # connects when it trains
    run = ResolvedRun(settled, FullModel(), tokenizer, storage, storage.child(name), backend, settled)
    return Alignment(run, train_data)

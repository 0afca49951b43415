"""Evaluating what a run left, on the recipe's evaluation data: in this process or as one Ray task."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymem.errors import DataError, ModelError
from raymem.methods.loram.recover import is_recovered
from raymem.planner import settle_micro_batch
from raymem.recipe.schema import Base, FullBase, NoAdapter, Recipe
from raymem.runs import demo, loram_base
from raymem.runs.artifacts import local_copy
from raymem.runs.prepare import prepare_split, shared_tokenizer
from raymem.storage.storage import Storage
from raymem.training.artifacts.export import FACTS, artifact_name
from raymem.training.data.dataset import PackedRows
from raymem.training.data.shards import Prepared
from raymem.training.data.shared import localise, to_dict
from raymem.training.dist_env import Layout
from raymem.training.evaluate import Evaluation, evaluate
from raymem.training.model.build import build_model, load_config
from raymem.training.model.revision import at_revision, began_with, on_hub, resolve, trained_from
from raymem.training.model.sentences import first_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """Evaluation of one artefact."""

    artifact: str
    result: Evaluation


def evaluate_recipe(recipe: Recipe, artifact: str | None = None, *, prepared: Prepared | None = None) -> Evaluated:
    """Evaluation loss of a run's artefact, on the revision of the base that it was trained on.

    Args:
        artifact: PEFT or model directory; ``base`` is the model without an adapter; by default the run's own result.
        prepared: the evaluation data, of a caller that has checked the base too.

    Raises:
        DataError: the recipe has no evaluation data.
        ModelError: there is nothing to evaluate, or the recipe names another revision than it was trained on.
    """
    if recipe.data.eval is None:
        raise DataError("data.eval: this recipe has no evaluation data; add it, or --set data.eval=<path>")
    storage = Storage.open(recipe.storage.path)
    place = artifact or _own_artifact(recipe, storage)
    recipe = _as_trained(recipe, place, storage)
    recipe = demo.resolve(settle_micro_batch(recipe, status=log.info), storage)
    on_ray = recipe.scaling.num_workers != 0
    if on_ray:
        from raymem.cluster.connection import connect

        connect(recipe)
    if prepared is None:
        if not is_recovered(place):
            recipe = loram_base.settled(recipe, storage, on_ray=on_ray)
        load_config(recipe)  # what cannot be loaded is refused before data are prepared
        tokenizer = shared_tokenizer(recipe, storage)
        prepared = prepare_split(recipe, "eval", tokenizer, storage, on_ray=on_ray)
    config = {"recipe": recipe.to_dict(), "artifact": place, "data": to_dict(prepared)}
    return Evaluated(place, _evaluated(config, recipe) if on_ray else evaluation_task(config))


def evaluation_task(config: dict[str, Any]) -> Evaluation:
    """One process's evaluation; plain data in, plain values out."""
    recipe = Recipe.model_validate(config["recipe"])
    with local_copy(config["artifact"]) as directory:
        adapter = Path(directory) if (Path(directory) / "adapter_config.json").is_file() else None
        return _evaluate(_with_weights(recipe, directory), adapter, config["data"])


def _evaluated(config: dict[str, Any], recipe: Recipe) -> Evaluation:
    from raymem.cluster.tasks import call_as_worker

    return call_as_worker(evaluation_task, config, recipe)


def _evaluate(recipe: Recipe, adapter: Path | None, plain_data: dict[str, Any]) -> Evaluation:
    prepared = localise(plain_data, Storage.open(recipe.storage.path))
    layout = Layout.current(recipe)
    model = build_model(recipe, layout, adapter_at=adapter)
    mixed = recipe.train.precision == "bf16_mixed"
    rows = PackedRows(prepared.directories)
    with first_step(model, is_first=True):
        return evaluate(model, rows, layout, micro_batch=recipe.train.rows_per_pass, mixed=mixed)


def _own_artifact(recipe: Recipe, storage: Storage) -> str:
    run = storage.child(recipe.name)
    name = artifact_name(recipe)
    if not run.exists(f"{name}/{FACTS}"):
        raise ModelError(
            f"{run.join(name)}: run {recipe.name!r} has no result yet; train it first, or give --artifact "
            "(a PEFT or model directory, or base)"
        )
    return run.join(name)


def _as_trained(recipe: Recipe, place: str, storage: Storage) -> Recipe:
    """The recipe at the revision that an artefact was trained on; the bare model's is that of the run."""
    if not on_hub(recipe.model):
        return recipe
    trained = None if place == "base" else trained_from(place, recipe.model.name)
    if trained is not None and trained.is_meant_by(recipe.model):
        return resolve(recipe, trained)
    resolved = resolve(recipe, began_with(storage.child(recipe.name)))
    # What others trained may name a branch.
    if trained is not None and resolve(at_revision(recipe, trained.commit)).model.revision != resolved.model.revision:
        raise ModelError(
            f"model.revision: {recipe.model.revision} is commit {resolved.model.revision} of {recipe.model.name}, but "
            f"{place} was trained on {trained.commit}; leave it out, or name that commit"
        )
    return resolved


def _with_weights(recipe: Recipe, artifact: str) -> Recipe:
    """The recipe of one unsharded process that starts from a local ``artifact``; an adapter is loaded as it is."""
    update: dict[str, Any] = {
        "scaling": recipe.scaling.model_copy(update={"num_workers": 0, "strategy": "ddp"}),
        "adapter": NoAdapter(),
    }
    directory = Path(artifact)
    if artifact == "base":
        pass
    elif (directory / "adapter_config.json").is_file():
        update["base"] = _unpruned(recipe) if is_recovered(directory) else recipe.base
    elif (directory / "config.json").is_file():
        update["model"] = recipe.model.model_copy(update={"name": str(directory), "config": None, "revision": None})
        update["base"] = _unpruned(recipe)
    else:
        raise ModelError(f"--artifact: {artifact} holds neither adapter_config.json nor config.json")
    return recipe.model_copy(update=update)


def _unpruned(recipe: Recipe) -> Base:
    """A model directory or a recovered adapter does not sit on the pruned model that the recipe trains on."""
    return FullBase() if recipe.base.kind == "loram" else recipe.base

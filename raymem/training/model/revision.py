"""Resolves the hub commit that a recipe means: the one that its run began with, else the one that the hub has today.

A branch such as ``main`` moves. A run, its evaluation and its artefact mean one commit all the same, so whoever starts
something asks :func:`resolve_revision`, with what is known of the run or of the artefact.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from raymem.errors import StorageError
from raymem.recipe.load import MODELS, SMOLLM2
from raymem.recipe.schema import ModelSection, Recipe
from raymem.storage import json_files
from raymem.storage.storage import Storage
from raymem.training.artifacts.facts import FACTS
from raymem.training.checkpoint import FOLDER, latest_recipe
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import fetch

RECORD = "revision.json"
"""The file in the directory of a run, from its start, that says which model it began with."""


_TEXT = (str, type(None))
_OF_ADAPTER = {"base_model_name_or_path": _TEXT, "revision": _TEXT}
_CURE = "the file is damaged: delete it, or restore it from a copy"


@dataclass(frozen=True)
class Began:
    """The model that a run began with."""

    name: str | None
    """Hugging Face id of the model."""
    commit: str | None
    asked: str | None
    """The recipe's ``model.revision``, which may name a branch, a tag, the commit, or nothing."""

    def is_meant_by(self, model: ModelSection) -> bool:
        """Say whether a recipe goes on with it: asks for the same as the run's did, for that commit, or for nothing."""
        return model.name == self.name and model.revision in (None, self.asked, self.commit)


def resolve_revision(recipe: Recipe, *earlier: Began | None) -> Recipe:
    """Return the recipe with the exact commit of a hub id as its revision; others are left alone.

    Args:
        earlier: what it may go on with; the first one that it means counts, and without any it is today's commit.

    Raises:
        ModelError: that commit of the model cannot be had.
    """
    model = recipe.model
    if not on_hub(model):
        return recipe
    for began in earlier:
        if began is not None and began.is_meant_by(model):
            return recipe if began.commit is None else at_revision(recipe, _commit(model.name, began.commit))
    if getattr(recipe.base, "artifact", None) is not None:
        return recipe  # the manifest of a pruned model names the commit
    return at_revision(recipe, _commit(model.name, model.revision))


def at_revision(recipe: Recipe, revision: str | None) -> Recipe:
    """Return the recipe with another ``model.revision``."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": revision})})


def began_with(run: Storage) -> Began | None:
    """Return the record of the model that a run began with, or None if it has not begun.

    Raises:
        StorageError: its record, or the manifest of its last checkpoint, cannot be read.
    """
    if run.exists(RECORD):
        return _recorded(run)
    recipe = latest_recipe(run)  # runs of earlier versions have no record
    return None if recipe is None else _of_model(recipe["model"])


def trained_from(artifact: str, name: str | None) -> Began | None:
    """Return the commit that a PEFT or model directory says it was trained from, if it is one of the model ``name``.

    Raises:
        StorageError: one of its files is damaged.
    """
    directory = Storage.open(artifact if "://" in artifact else os.path.abspath(artifact))
    records = []
    if directory.exists("adapter_config.json"):
        config = directory.read_object("adapter_config.json", _OF_ADAPTER, cure="take a whole copy of the adapter")
        records.append(Began(config.get("base_model_name_or_path"), config.get("revision"), config.get("revision")))
    if directory.exists(FACTS):
        facts = directory.read_object(FACTS)
        for name_of_section in ("recipe", "model"):
            facts = json_files.as_object(
                facts.get(name_of_section, {}), f"{directory.join(FACTS)}: {name_of_section}", StorageError, _CURE
            )
        records.append(_of_model(facts))
    return next((began for began in records if began.name == name and began.commit is not None), None)


def record(run: Storage, recipe: Recipe, asked: str | None) -> None:
    """Write down what a run begins with. Once it has checkpoints, which are tied to that, nothing changes any more.

    Args:
        recipe: as it was resolved.
        asked: ``model.revision`` of the recipe as it was given.

    Raises:
        StorageError: it cannot be written.
    """
    if recipe.model.revision is None or not on_hub(recipe.model) or run.list_dirs(FOLDER):
        return
    began = Began(recipe.model.name, recipe.model.revision, asked)
    if run.exists(RECORD) and asked in (None, began.commit):  # says less than the recipe before may have said
        before = _recorded(run)
        if (before.name, before.commit) == (began.name, began.commit):
            return
    run.write_record(RECORD, asdict(began))


def on_hub(model: ModelSection) -> bool:
    """Say whether the model is named by an id of the hub, rather than a place, raymem's own name or a config."""
    name = model.name
    return name is not None and "://" not in name and name not in {*MODELS, SMOLLM2} and not Path(name).is_dir()


def _recorded(run: Storage) -> Began:
    stored = run.read_record(RECORD, dict.fromkeys(("name", "commit", "asked"), _TEXT), cure=_CURE)
    return Began(stored.get("name"), stored.get("commit"), stored.get("asked"))


def _of_model(plain: dict[str, str | None]) -> Began:
    return Began(plain.get("name"), plain.get("revision"), plain.get("revision"))


def _commit(name: str | None, revision: str | None) -> str:
    return fetch(name or "", revision, DistEnv(), weights_too=False).name

"""Reads what is asked of raymem in a trainer of somebody else: axes of a recipe, in a mapping, a file or a recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raymem.errors import RecipeError
from raymem.memory.budget import parse_bytes
from raymem.recipe.axes import ADAPTERS, MEMORY_AXES, full_base, no_adapter
from raymem.recipe.load import load_recipe, read_yaml, recipe_of
from raymem.recipe.schema import Recipe
from raymem.recipe.sentences import nearest

log = logging.getLogger(__name__)

SettingsLike = Mapping[str, Any] | str | Path | Recipe

AXES = tuple(name for name in MEMORY_AXES if name != "base")
"""The axes that can be asked for; a trainer has its model already."""
TAKEN = (*AXES, "budget", "seed")
_BASE_CURE = (
    "the trainer's model is built and loaded already; load it as it is to be (BitsAndBytesConfig for 4 bits, "
    "raymem.methods.load_pruned for a pruned one) and leave base out"
)


@dataclass(frozen=True)
class Settings:
    """The settings of a run in a trainer of somebody else."""

    recipe: Recipe
    """A recipe with the axes that are asked for. Its other sections stand for what the trainer decides."""
    asked: frozenset[str]
    """The axes that raymem is to bring; the others stay as the trainer has them."""
    has_lr: bool
    """Whether the settings name a learning rate, rather than leave it to the trainer."""

    @property
    def budget_bytes(self) -> int | None:
        """Bytes of one worker's device; None if nothing is checked."""
        return None if self.recipe.budget is None else parse_bytes(self.recipe.budget)

    def with_train(self, **train: Any) -> Settings:
        """Return the settings with what is known of the trainer's steps by now, checked against each other.

        Raises:
            RecipeError: the settings do not go with them.
        """
        raw = self.recipe.to_dict()
        recipe = recipe_of({**raw, "train": {**raw["train"], **train}}, where="raymem", resolve=False)
        return Settings(recipe, self.asked, self.has_lr)


def read_settings(given: SettingsLike, *, has_adapter: bool) -> Settings:
    """Validate settings.

    Args:
        given: mapping of the sections in :data:`TAKEN`, as a recipe has them; a YAML file of them; or a recipe, or its
            file. A recipe means all of its axes, with their defaults; what a trainer has of its own is left aside.
        has_adapter: the model has an adapter already, which is not raymem's to bring.

    Raises:
        RecipeError: names every section, option or value that cannot be taken, and what to do.
    """
    where = "raymem"
    if isinstance(given, Recipe):
        raw = given.to_dict()
    elif isinstance(given, Mapping):
        raw = dict(given)
        if theirs := [name for name in raw if name in Recipe.model_fields and name not in (*TAKEN, "base")]:
            raise RecipeError(f"{where}: {theirs[0]}: the trainer has that of its own; leave it out")
    else:
        where, raw = str(given), read_yaml(Path(given))
        if any(name in Recipe.model_fields and name not in (*TAKEN, "base") for name in raw):
            raw = load_recipe(given).to_dict()
    if unknown := [name for name in raw if name not in Recipe.model_fields]:
        raise RecipeError(f"{where}: {unknown[0]}: unknown key{nearest(str(unknown[0]), TAKEN)}")
    asked = frozenset(name for name in AXES if raw.get(name) is not None)
    if not asked and raw.get("budget") is None:
        raise RecipeError(f"{where}: nothing is asked for; give one or more of {', '.join(TAKEN)}")
    if theirs := [name for name in raw if name not in (*TAKEN, "base")]:
        taken = [name for name in TAKEN if raw.get(name) is not None]
        log.info("%s: of it %s are taken; the trainer has its own %s", where, ", ".join(taken), ", ".join(theirs))
    if "adapter" in asked and has_adapter:
        raise RecipeError(
            f"{where}: adapter: the model has an adapter already; leave adapter out, or give the bare model"
        )
    recipe = recipe_of(_completed(raw, has_adapter=has_adapter), where=where, resolve=False)
    if recipe.base != full_base():
        raise RecipeError(f"{where}: base: {_BASE_CURE}")
    optimizer = raw.get("optimizer")
    return Settings(recipe, asked, isinstance(optimizer, Mapping) and "lr" in optimizer)


def _completed(raw: Mapping[str, Any], *, has_adapter: bool) -> dict[str, Any]:
    """Return a whole recipe in plain values, with stand-ins for what the trainer decides."""
    adapter = ADAPTERS.initial_options() if has_adapter else no_adapter()
    return {
        "adapter": ADAPTERS.spelled_out(adapter),
        **{name: raw[name] for name in ("base", *TAKEN) if raw.get(name) is not None},
        "name": "trainer",
        "model": {"name": "trainer"},
        "data": {"train": "trainer"},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1, "clip_norm": None},
        "scaling": {"num_workers": 0, "use_gpu": torch.cuda.is_available()},
        "tracking": "none",
    }

"""Looks for the data files of a recipe before anything slow is imported or opened: a mistyped path is answered at once.

The process that drives a run reads such files itself, with Ray as without, so one of this machine's file tree must be
here. What lies on object stores or on a hub is looked for when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from raymem.recipe.axes import BASES
from raymem.recipe.data import DataSection, Source
from raymem.recipe.paths import is_local
from raymem.recipe.schema import Recipe
from raymem.training.data.sources.opened import files_of

Split = Literal["train", "eval"]
BOTH: tuple[Split, ...] = ("train", "eval")


def check_files_are_here(recipe: Recipe, splits: tuple[Split, ...] = BOTH) -> None:
    """Refuse a recipe that names local data that is not there; nothing of it is read.

    Raises:
        DataError: a path does not exist, is of no known kind, or is a directory without data of its split.
    """
    for where, source in _sources(recipe, splits):
        if is_local(source.path) and not source.path.startswith("demo:"):
            files_of(source, where, Path())  # the cache is for demo data only


def _sources(recipe: Recipe, splits: tuple[Split, ...]) -> Iterator[tuple[str, Source]]:
    sections = {"": recipe.data}
    aligning = BASES.of(recipe).alignment(recipe.base) or {}
    if "data" in aligning and "train" in splits:
        sections["base.align."] = DataSection.model_validate(aligning["data"])
    for prefix, section in sections.items():
        for split in splits:
            for index, source in enumerate(getattr(section, split) or ()):
                yield prefix + section.path_of(split, index), source

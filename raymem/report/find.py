"""Finds the runs and sweeps that a person names: by recipe, directory, URI, or name in the default storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raymem.errors import RecipeError, StorageError
from raymem.recipe.load import load_recipe
from raymem.recipe.paths import absolute
from raymem.recipe.schema import StorageSection
from raymem.storage.storage import Storage
from raymem.sweeps.options import sweep_name
from raymem.training.artifacts.facts import FACTS
from raymem.training.checkpoint import FOLDER
from raymem.training.history import FILE

SWEEP = "sweep.json"
"""The file in a sweep's directory that says what is searched."""
_MANY = 12


@dataclass(frozen=True)
class Place:
    """The directory of a run or a sweep."""

    directory: Storage
    name: str
    is_sweep: bool

    def beside(self, name: str) -> Storage:
        """Return a directory next to this one."""
        return Storage.open(_above(self.directory.path), self.directory.retry_for_s).child(name)


def find(target: str, overrides: Sequence[str] = ()) -> Place:
    """Find what is meant.

    Args:
        target: recipe file, directory or URI of a run, of its result or of a sweep, or a name in ``raymem-runs``.
        overrides: of the recipe, if it is one.

    Raises:
        RecipeError: the recipe is none, or it has not been trained.
        StorageError: nothing of the kind is there, or it cannot be looked at.
    """
    if is_recipe(target):
        return _of_recipe(target, overrides)
    if "://" in target:
        return _at(target.rstrip("/"), target)
    path = absolute(target)
    if not Path(path).exists() and "/" not in target:
        in_storage = absolute(str(Path(StorageSection().path) / target))
        path = in_storage if Path(in_storage).exists() else path
    return _at(path, target)


def is_recipe(target: str) -> bool:
    """Say whether a person means a recipe file."""
    return "://" not in target and (target.endswith((".yaml", ".yml")) or Path(target).is_file())


def _of_recipe(file: str, overrides: Sequence[str]) -> Place:
    recipe = load_recipe(file, overrides)
    storage = recipe.storage.open()
    for name in (recipe.name, sweep_name(recipe, None)):
        if (found := _found(storage.child(name))) is not None:
            return Place(storage.child(name), name, found == "sweep")
    raise RecipeError(
        f"{file}: there is no run {recipe.name!r} in {storage.path} yet; run: raymem train {file} (or give the "
        "directory of a run)"
    )


def _at(path: str, target: str) -> Place:
    directory = Storage.open(path)
    found = _found(directory)
    if found == "artifact":
        path = _above(path)
        directory = Storage.open(path)
        found = _found(directory)
    if found in ("run", "sweep"):
        return Place(directory, directory.root.rpartition("/")[2], found == "sweep")
    if not directory.exists(""):
        problem = "there is no such directory"
    else:
        problem = f"neither a run nor a sweep: it holds none of {FILE}, {FOLDER}/ and {SWEEP}"
    here = [name for name in directory.list_dirs() if _found(directory.child(name)) in ("run", "sweep")][: _MANY + 1]
    more = ", ..." if len(here) > _MANY else ""
    cure = f"give one of those in it: {', '.join(here[:_MANY])}{more}" if here else (
        "give a recipe that was trained, or the directory of a run or a sweep"
    )  # fmt: skip
    raise StorageError(f"{target}: {problem}; {cure}")


def is_run(directory: Storage) -> bool:
    """Say whether a run lies there."""
    return _found(directory) == "run"


def _above(path: str) -> str:
    """Return the path or URI of the directory that holds another."""
    path, question, options = path.partition("?") if "://" in path else (path, "", "")
    return path.rstrip("/").rpartition("/")[0] + question + options


def _found(directory: Storage) -> str | None:
    """Return ``sweep``, ``run``, ``artifact`` (the result of a run), or None."""
    if directory.exists(SWEEP):
        return "sweep"
    if directory.exists(FILE) or directory.exists(FOLDER):
        return "run"
    return "artifact" if directory.exists(FACTS) else None

"""Reads a search space and holds it against a recipe."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from raymem.errors import RecipeError
from raymem.recipe.axes import all_kinds
from raymem.recipe.load import parse_recipe, read_yaml, validated
from raymem.recipe.schema import Recipe
from raymem.recipe.sentences import nearest
from raymem.recipe.space import Point, Space, apply, sample


def load_space(source: str | None, recipe: Recipe, *, given_as: str = "--space") -> Space:
    """Load and checks a search space: every dimension exists somewhere, and both ends of it are valid values.

    Args:
        source: a Python file with ``SPACE``, a YAML file, or the name of a space that ships with raymem (``joint``); by
            default the recipe's own ``space``.
        given_as: what errors call ``source``.

    Raises:
        RecipeError: there is none, it cannot be read, or its paths or values are none of the recipe's.
    """
    if source is None:
        if recipe.space is None:
            raise RecipeError(
                f"there is no search space: give {given_as} ({', '.join(shipped())}, or a file), or write one into the "
                "recipe's `space` section"
            )
        space, where = recipe.space, "space"
    else:
        raw, where = _named(source, given_as)
        # The recipe's own schema says what a space is, and what is wrong with one.
        with_space = validated({**recipe.to_dict(), "space": raw}, where)
        assert with_space.space is not None
        space = with_space.space
    check_space(space, recipe, where)
    return space


def shipped() -> list[str]:
    """List the spaces that ship with raymem or with a kind from outside."""
    files = [file.stem for file in _folder().glob("*.py") if file.stem != "__init__"]
    return sorted({*files, *_of_kinds()})


def _of_kinds() -> dict[str, Any]:
    """Map the name of a kind to the search space that it brings."""
    return {kind.name: dict(kind.space) for kind in all_kinds() if kind.space}


def recipe_at(recipe: Recipe, point: Point, where: str) -> Recipe:
    """Build the recipe of a point.

    Raises:
        RecipeError: its values are not valid, or do not go together.
    """
    return parse_recipe({**apply(recipe.to_dict(), point), "space": None}, where)


def check_space(space: Space, recipe: Recipe, where: str) -> None:
    """See :func:`load_space`; which values go together is left to each point."""
    raw = recipe.to_dict()
    for path, dimension in space.items():
        needed_values = _reachable(space, raw, path, where)
        for value in dimension.grid():
            forced = {**needed_values, path: value}
            point = sample(space, raw, lambda p, d, forced=forced: forced.get(p, d.grid()[0]))  # type: ignore[misc]
            if path not in point:
                raise RecipeError(
                    f"{where}: {path}: its `when` is never true with this recipe: {dimension.when}; put what it asks "
                    "for earlier in the space, or into the recipe"
                )
            # Only what this dimension and its conditions say: others may not go with it.
            own = {p: v for p, v in point.items() if p in forced}
            validated({**apply(raw, own), "space": None}, where)


def _reachable(space: Space, raw: Mapping[str, Any], path: str, where: str) -> dict[str, Any]:
    """Return values of earlier dimensions with which the dimension exists."""
    needed_values: dict[str, Any] = {}
    order = list(space)
    for asked, allowed in space[path].when.items():
        if asked not in space:
            continue  # the recipe's own value, which `sample` looks at
        if order.index(asked) >= order.index(path):
            raise RecipeError(
                f"{where}: {path}: its `when` asks about {asked}, which has no value there yet; put {asked} earlier in "
                "the space"
            )
        possible = [value for value in allowed if _may_be(space[asked], value)]
        if not possible:
            raise RecipeError(f"{where}: {path}: when {asked} is {allowed}, but the space never puts that there")
        needed_values |= {asked: possible[0], **_reachable(space, raw, asked, where)}
    return needed_values


def _may_be(dimension: Any, value: Any) -> bool:
    if dimension.type == "choice":
        return value in dimension.choices
    return isinstance(value, int | float) and dimension.low <= value <= dimension.high


def _named(source: str, given_as: str) -> tuple[Any, str]:
    """Return the space that a user means, unvalidated, and its name in errors."""
    path = Path(source)
    if path.suffix in (".py", ".yaml", ".yml"):
        return _read(path), str(path)
    if source not in shipped():
        raise RecipeError(
            f"{given_as} {source}: no space of that name ships with raymem{nearest(source, shipped())}; a file ends in "
            ".py or .yaml"
        )
    if source in (spaces := _of_kinds()):
        return spaces[source], f"the search space of {source}"
    path = _folder() / f"{source}.py"
    return _read(path), str(path)


def _folder() -> Path:
    installed = Path(str(resources.files("raymem"))) / "spaces"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "tune_spaces"


def _read(path: Path) -> Any:
    if path.suffix != ".py":
        raw = read_yaml(path)
        return raw.get("space", raw)
    try:
        names = runpy.run_path(str(path))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; {', '.join(shipped())} ship with raymem") from None
    except Exception as error:  # a user's code may raise anything
        raise RecipeError(f"{path}: cannot be run: {type(error).__name__}: {error}") from None
    if "SPACE" not in names:
        raise RecipeError(f"{path}: has no SPACE; write SPACE = {{'adapter.rank': {{'type': 'choice', ...}}}}")
    return names["SPACE"]

"""Search spaces that ship with raymem: every key is a path of the recipe, every point is a recipe, every end builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymem.recipe.schema import Recipe
from raymem.recipe.space import Point, grid
from raymem.recipe.space_load import load_space, recipe_at, shipped
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater
from tests.helpers.support import make_recipe

METHODS: dict[str, dict[str, Any]] = {
    "joint": {},
    "loram": {"base": {"kind": "loram", "keep_first": 0, "keep_last": 1}, "adapter": {"kind": "lora"}},
    "loract": {"activations": {"kind": "loract"}},
    "mlorc": {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "min_dim": 40}},
    "moram": {"adapter": {"kind": "moram"}},
}


def points(name: str, recipe: Recipe) -> list[Point]:
    return list(grid(load_space(name, recipe), recipe.to_dict()))


def test_every_space_is_covered() -> None:
    assert shipped() == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_point_is_a_recipe(name: str) -> None:
    recipe = make_recipe(METHODS[name])
    for point in points(name, recipe):
        recipe_at(recipe, point, name)


@pytest.mark.parametrize("name", METHODS)
def test_every_end_builds(name: str, llama: Path) -> None:
    recipe = make_recipe(METHODS[name], model=llama)
    space, every = load_space(name, recipe), points(name, recipe)
    for path, dimension in space.items():
        for value in dimension.grid():
            found = recipe_at(recipe, next(point for point in every if point.get(path) == value), name)
            build_updater(build_model(found, meta=True), found)

"""The search space of MoRAM: every key is a path of the recipe, and every corner builds a model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from support import make_recipe, merged

from raymem.training.model import build_model
from tune_spaces.moram import SPACE


def ends(dimension: dict[str, Any]) -> list[Any]:
    if dimension["type"] == "choice":
        return [dimension["choices"][0], dimension["choices"][-1]]
    return [dimension["low"], dimension["high"]]


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", SPACE)
def test_a_key_is_a_path_of_the_recipe(path: str) -> None:
    raw: Any = make_recipe({"adapter": {"kind": "moram"}}).to_dict()
    for part in path.split("."):
        raw = raw[part]
    assert ends(SPACE[path])


def test_every_corner_builds(llama: Path) -> None:
    for corner in itertools.product(*(ends(dimension) for dimension in SPACE.values())):
        fragments = [nested(path, value) for path, value in zip(SPACE, corner, strict=True)]
        recipe = make_recipe({"adapter": {"kind": "moram"}}, merged(*fragments), model=llama)
        assert recipe.adapter.kind == "moram"
    build_model(recipe, meta=True)


def test_every_choice_builds(llama: Path) -> None:
    for path, dimension in SPACE.items():
        for value in dimension.get("choices", ends(dimension)):  # type: ignore[attr-defined]
            recipe = make_recipe({"adapter": {"kind": "moram"}}, nested(path, value), model=llama)
            build_model(recipe, meta=True)

"""Search spaces: every key is a path of the recipe, every corner is a recipe and builds a model."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
from support import make_recipe, merged

from raymem.training.model import build_model
from raymem.training.optim import build_updater

METHODS: dict[str, dict[str, Any]] = {
    "loram": {"base": {"kind": "loram", "keep_first": 0, "keep_last": 1}, "adapter": {"kind": "lora"}},
    "loract": {"activations": {"kind": "loract"}},
    "mlorc": {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "min_dim": 40}},
    "moram": {"adapter": {"kind": "moram"}},
}
SPACES = {name: importlib.import_module(f"tune_spaces.{name}").SPACE for name in METHODS}
KEYS = {"float": {"type", "low", "high", "log"}, "int": {"type", "low", "high"}, "choice": {"type", "choices"}}


def ends(dimension: dict[str, Any]) -> list[Any]:
    if dimension["type"] == "choice":
        return list(dimension["choices"])
    return [dimension["low"], dimension["high"]]


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return dict(value)


def test_every_file_is_covered() -> None:
    files = {path.stem for path in (Path(__file__).parents[1] / "tune_spaces").glob("*.py")} - {"__init__"}
    assert files == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_key_is_a_path_of_the_recipe(name: str) -> None:
    raw = make_recipe(METHODS[name]).to_dict()
    for path, dimension in SPACES[name].items():
        assert set(dimension) == KEYS[dimension["type"]]
        node: Any = raw
        for part in path.split("."):
            assert part in node, path
            node = node[part]


@pytest.mark.parametrize("name", METHODS)
def test_every_corner_is_a_recipe(name: str) -> None:
    for corner in itertools.product(*map(ends, SPACES[name].values())):
        fragments = [nested(path, value) for path, value in zip(SPACES[name], corner, strict=True)]
        make_recipe(METHODS[name], merged(*fragments))


@pytest.mark.parametrize("name", METHODS)
def test_every_end_builds(name: str, llama: Path) -> None:
    for path, dimension in SPACES[name].items():
        for value in ends(dimension):
            recipe = make_recipe(METHODS[name], nested(path, value), model=llama)
            build_updater(build_model(recipe, meta=True), recipe)

"""Whatever a recipe's text holds, it is a recipe or one short error."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from raymem.errors import RecipeError
from raymem.recipe.load import load_recipe, recipe_of
from raymem.recipe.schema import Recipe

RAW: dict[str, Any] = {
    "name": "a",
    "seed": 1,
    "model": {"name": "org/model", "tokenizer": "demo", "dtype": "auto"},
    "data": {"train": [{"path": "a.jsonl", "weight": 1.0}], "eval": {"x": "b.jsonl"}, "sequence_length": 64},
    "adapter": {"kind": "lora", "rank": 8, "targets": ["q_proj"]},
    "optimizer": {"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.95]},
    "train": {"steps": 10, "warmup": 0.1},
    "scaling": {"num_workers": [1, 2]},
    "budget": "1GiB",
    "storage": {"path": "runs"},
    "tracking": {"kind": "none"},
    "space": {"adapter.rank": {"type": "int", "low": 1, "high": 8}},
}
TEXTS = (
    *("", "!!int abc", "!!timestamp q", "2026-02-31", "010", "1:30", "yes", "&a [*a]", "{a: 1, a: 2}", "~nosuchuser/x"),
    *("http://x@h", "9" * 200, "1e999", ".nan", "[[[[[[", '"\\0"', '"\\ud800"', "x" * 3000, "? [a]", "<<: 3"),
)
SIGNS = (*RAW, ": ", "\n", "- ", "  ", "&a ", "*a", "{", "}", "\t", "%YAML 9")
ODD = st.sampled_from(TEXTS)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
FEW = settings(max_examples=150, derandomize=True, deadline=None, database=None)


def paths(node: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in inner for found in [(*before, key), *paths(value, (*before, key))]]


def check(make: Any) -> None:
    try:
        recipe = make()
    except RecipeError as error:
        text = str(error)
    else:
        assert isinstance(recipe, Recipe)
        text = ""
    assert len(text) < 4000


@FEW
@given(st.sampled_from(paths(RAW)), VALUES)
def test_any_value_anywhere(path: tuple[Any, ...], value: Any) -> None:
    raw = copy.deepcopy(RAW)
    node: Any = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    check(lambda: recipe_of(raw))


@FEW
@given(st.sampled_from(paths(RAW)), ODD | st.text(max_size=30))
def test_any_override(path: tuple[Any, ...], text: str) -> None:
    check(lambda: recipe_of(RAW, [f"{'.'.join(map(str, path))}={text}"]))


@FEW
@given(st.lists(ODD | st.sampled_from(SIGNS) | st.text(max_size=9)))
def test_any_text(pieces: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.yaml"
        file.write_bytes("".join(pieces).encode("utf-8", "surrogatepass"))
        check(lambda: load_recipe(file))

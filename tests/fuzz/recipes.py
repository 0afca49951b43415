"""Recipes, overrides and search spaces."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from raymem.recipe.load import load_recipe, recipe_of
from raymem.recipe.schema import Recipe
from raymem.recipe.space_load import load_space
from raymem.recipe.yaml_text import write
from tests.fuzz.cases import ODD, VALUES, Target

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
SIGNS = (*RAW, ": ", "\n", "- ", "  ", "&a ", "*a", "{", "}", "\t", "%YAML 9")
VALUES_OF_YAML = VALUES | st.dictionaries(st.integers() | st.text(max_size=4), VALUES, max_size=3)


def paths(node: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in inner for found in [(*before, key), *paths(value, (*before, key))]]


SPACE: dict[str, Any] = {
    "adapter.rank": {"type": "int", "low": 1, "high": 8, "log": True},
    "optimizer.lr": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
    "optimizer.kind": {"type": "choice", "choices": ["adamw", "mlorc_adamw"]},
    "optimizer.rank": {"type": "choice", "choices": [2, 4], "when": {"optimizer.kind": ["mlorc_adamw"]}},
}


def with_value(raw: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of ``raw`` with another value at ``path``."""
    changed = copy.deepcopy(raw)
    node: Any = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return changed


def _mutations(raw: dict[str, Any], values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """``raw`` with one to three values, or keys beside them, that are others."""
    key = st.sampled_from(paths(raw)) | st.tuples(st.sampled_from(sorted(raw)), st.text(max_size=8) | ODD)
    change = st.tuples(key, values)

    def changed(changes: list[tuple[tuple[Any, ...], Any]]) -> dict[str, Any]:
        made = raw
        for path, value in changes:
            try:
                made = with_value(made, path, value)
            except (KeyError, IndexError, TypeError):  # an earlier change took its place away
                continue
        return made

    return st.lists(change, min_size=1, max_size=2).map(changed)


def _from_text(pieces: list[str]) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.yaml"
        file.write_bytes("".join(pieces).encode("utf-8", "surrogatepass"))
        return load_recipe(file)


def _space_of(space: dict[str, Any]) -> Any:
    recipe = recipe_of({**RAW, "space": space})
    return load_space(None, recipe)


def _space_in_a_file(pieces: list[str]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.yaml"
        file.write_bytes("".join(pieces).encode("utf-8", "surrogatepass"))
        return load_space(str(file), recipe_of({key: value for key, value in RAW.items() if key != "space"}))


_TEXT = st.lists(ODD | st.sampled_from(SIGNS) | st.text(max_size=9)) | st.builds(
    lambda raw, at, piece: [write(raw)[:at], piece, write(raw)[at:]],
    _mutations({**RAW, "space": SPACE}, st.none() | st.integers(0, 9) | st.text(max_size=9)),
    st.integers(0, 900),
    st.just("") | ODD | st.sampled_from(SIGNS),
)
_WORDS = st.sampled_from(
    ["1", "0.5", "[1, 2]", "null", "lora", "full", "{kind: lora}", "a.jsonl", "2GiB", "auto", "true"]
)
_DOTTED = st.sampled_from([".".join(map(str, path)) for path in paths(RAW)]) | st.text(max_size=12)
TARGETS = {
    "recipes": Target(_mutations(RAW, VALUES_OF_YAML), recipe_of),
    "recipe texts": Target(_TEXT, _from_text),
    "overrides": Target(
        st.lists(st.builds("{}={}".format, _DOTTED, _WORDS | ODD | st.text(max_size=30)), min_size=1, max_size=3),
        lambda overrides: recipe_of(RAW, overrides),
    ),
    "spaces": Target(_mutations(SPACE, VALUES_OF_YAML), _space_of),
    "space texts": Target(
        st.builds(
            lambda raw, at, piece: [write(raw)[:at], piece, write(raw)[at:]],
            _mutations(SPACE, st.integers(0, 9) | st.text(max_size=9) | ODD),
            st.integers(0, 400),
            st.just("") | ODD | st.sampled_from(SIGNS),
        ),
        _space_in_a_file,
    ),
}

"""The JSON schema accepts what the reader accepts, as a person writes it, and refuses unknown keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raymem.recipe.load import load_recipe, recipe_schema
from tests.helpers.support import PLAIN, merged

RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> Any:
    found = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_packaged_recipe_loads_and_fits_the_schema(path: Path, schema: Any) -> None:
    load_recipe(path)
    schema.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "fragment",
    [
        {},
        {"adapter": "none", "activations": "checkpoint", "optimizer": "adamw", "base": "full", "tracking": "mlflow"},
        {"data": {"train": "a.jsonl", "eval": "b.jsonl"}},
        {"data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}], "eval": [{"path": "c.csv"}]}},
        {"data": {"train": {"path": "a.jsonl"}, "eval": None}},
        {"data": {"train": "a.jsonl", "eval": {"math": "a.jsonl", "chat": {"path": "b.jsonl"}, "both": ["c", "d"]}}},
        {"data": {"train": "a.jsonl", "mix": {"by": "tokens", "temperature": 2}}},
        {"scaling": {"num_workers": [1, 4]}},
        {"train": {"clip_norm": None, "warmup": 10}},
    ],
    ids=str,
)
def test_what_a_person_writes_fits(fragment: dict[str, Any], schema: Any) -> None:
    schema.validate(merged(PLAIN, fragment))
    without_name = {key: value for key, value in merged(PLAIN, fragment).items() if key != "name"}
    schema.validate(without_name)


@pytest.mark.parametrize(
    "fragment",
    [
        {"adaptor": "lora"},
        {"train": {"step": 3}},
        {"adapter": {"rnk": 3}},
        {"adapter": "lroa"},
        {"adapter": {"rank": 0}},
        {"data": {"train": [{"pth": "a"}]}},
        {"data": {"train": {"math": "a"}}},
        {"data": {"train": "a", "eval": {"pth": "a", "split": "test"}}},
        {"data": {"train": "a", "mix": {"temperature": 0}}},
        {"train": {"precision": "fp16"}},
    ],
    ids=str,
)
def test_what_the_reader_refuses_does_not_fit(fragment: dict[str, Any], schema: Any) -> None:
    assert not schema.is_valid(merged(PLAIN, fragment))

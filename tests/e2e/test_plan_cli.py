"""``raymem plan`` and the budget as a person uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from raymem.cli.main import run_app
from raymem.errors import BudgetExceeded
from raymem.planner import known_plan
from raymem.recipe.load import load_recipe
from raymem.runs import train
from tests.helpers.support import FAMILIES, run_fragment

pytestmark = pytest.mark.usefixtures("planned_here")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a directory that holds a config and no weights."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.json").write_text(json.dumps({**FAMILIES["llama"], "architectures": ["LlamaForCausalLM"]}))
    raw = {
        "model": {"name": str(folder)},
        "data": {"train": "train.jsonl", "sequence_length": 32},
        "train": {"steps": 2, "global_batch": 2, "micro_batch": 2},
        "tracking": "none",
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_json_has_every_term_and_the_verdict(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("plan", recipe, "--json", "--budget", "1GiB") == 0
    found = json.loads(capsys.readouterr().out)
    terms = ("weights", "trainable", "gradients", "optimizer", "activations", "loss", "workspace")
    assert sum(found[f"{term}_bytes"] for term in terms) == found["peak_bytes"]
    assert found["verdict"] == "fits"
    assert found["headroom_bytes"] == (1 << 30) - found["capacity_bytes"]
    assert found["reserved_bytes"] == found["capacity_bytes"] == found["peak_bytes"]


def test_what_does_not_fit_is_said_and_ends_with_1(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "timeline.png"
    assert run_app("plan", recipe, "--budget", "100KiB", "--plot", picture) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said and "the largest term is" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_options_are_one_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("plan", recipe, "--gpu", "H1000") == 1
    assert "known are" in capsys.readouterr().err
    assert run_app("plan", recipe, "--budget", "lots") == 1
    assert "--budget: 'lots' is no amount of memory" in capsys.readouterr().err
    assert run_app("plan", recipe, "-s", "budget=lots") == 1
    assert "budget: 'lots' is no amount of memory; write it as 24GiB" in capsys.readouterr().err


def test_training_is_refused_above_the_budget_before_anything_starts(
    llama: Path, examples: Path, tmp_path: Path
) -> None:
    raw = {
        "model": {"name": str(llama)},
        "train": {"steps": 3, "global_batch": 2, "micro_batch": 2},
        "scaling": {"num_workers": 0},
        "tracking": "none",
        "budget": "100KiB",
        **run_fragment(examples, tmp_path / "runs"),
    }
    raw["data"]["sequence_length"] = 64  # so long that every row holds several examples, as plans assume
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw))
    loaded = load_recipe(path)
    with pytest.raises(BudgetExceeded, match=r"budget: 100KiB is less than .* by .*; the largest term is .* --force"):
        train.launch(loaded)
    assert not (tmp_path / "runs" / "r").exists()
    finished = train.launch(loaded, force=True)
    plan, measured = known_plan(loaded), finished.outcome.peak_bytes
    assert plan is not None and measured is not None
    assert finished.predicted_peak_bytes == plan.step_peak_bytes == pytest.approx(measured, rel=0.1)

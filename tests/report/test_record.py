"""What a real run leaves for its page: its data with the targets, its plan, and what it keeps between steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raymem.report import facts
from raymem.report.facts import read_run
from raymem.report.find import find
from raymem.runs.record import MOST_CHARACTERS, PLAN
from raymem.storage.storage import Storage
from tests.helpers.commands import run_command
from tests.helpers.report_files import write_plan
from tests.helpers.run_files import write_recipe


def test_a_run_leaves_what_its_page_shows(
    llama: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "mine.yaml", tmp_path, llama, examples)
    done = run_command("train", recipe)
    assert done.returncode == 0, done.stderr
    run = read_run(find(str(recipe)))
    assert run.is_finished and run.steps == 4 and run.name == "mine"
    assert run.data is not None
    assert [one.path for one in run.data.train] == [str(examples / "train.jsonl")]
    assert [one.path for one in run.data.eval] == [str(examples / "eval.jsonl")]
    first = run.data.examples[0].parts
    assert any(part.is_target for part in first) and all(len(part.text) <= MOST_CHARACTERS for part in first)
    trained = sum(
        tensor["data_offsets"][1] - tensor["data_offsets"][0]
        for file in (tmp_path / "runs" / "mine" / "adapter").glob("*.safetensors")
        for name, tensor in header(file).items()
        if name != "__metadata__"
    )
    assert run.held["trainable"] == trained, "fp32 adapters, in the file as they are in memory"
    assert 2 * trained <= run.held["optimizer"] < 2 * trained + 1024, "two moments, and AdamW's counters"
    weights = sum(
        tensor["data_offsets"][1] - tensor["data_offsets"][0]
        for name, tensor in header(llama / "model.safetensors").items()
        if name != "__metadata__"
    )
    assert weights <= run.held["weights"] < weights + 4096, "and a few buffers"
    assert run.peak_bytes is not None and sum(run.held.values()) < run.peak_bytes
    assert run.plan is None, "it was not planned, having no budget"

    assert run.predictions == []
    said = json.loads(run_command("evaluate", recipe, "--json", "--predictions", 2).stdout)
    again = read_run(find(str(recipe)))
    assert [vars(one) for one in again.predictions] == said["predictions"] and len(again.predictions) == 2
    other = run_command("evaluate", recipe, "--artifact", "base", "--predictions", 1)
    assert other.returncode == 0, other.stderr
    assert read_run(find(str(recipe))).predictions == again.predictions, "those of the run's own result stay"

    write_plan(Storage.open(run.place))
    monkeypatch.setattr(facts, "plan_many", None)  # it has one
    page = tmp_path / "page.html"
    assert run_command("report", recipe, "--html", page).returncode == 0
    assert "Predicted before the training" in page.read_text()


@pytest.mark.slow
def test_a_plan_is_kept_or_made(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "mine.yaml", tmp_path, llama, examples)
    assert run_command("train", recipe, "-s", "budget=1GiB").returncode == 0
    run = find(str(recipe)).directory
    kept = read_run(find(str(recipe)))
    assert kept.plan is not None and not kept.plan.made_now
    assert kept.plan.peak_bytes == run.read_record(PLAN)["step_peak_bytes"]
    assert kept.plan.terms["trainable"] == kept.held["trainable"]
    Path(run.join(PLAN)).unlink()
    [made] = facts.with_plans([read_run(find(str(recipe)))], lambda text: None)
    assert made.plan is not None and made.plan.made_now
    assert made.plan.terms == kept.plan.terms


def header(file: Path) -> dict[str, dict[str, list[int]]]:
    """The header of a safetensors file."""
    content = file.read_bytes()
    found: dict[str, dict[str, list[int]]] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return found

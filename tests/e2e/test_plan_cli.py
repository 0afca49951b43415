"""``raymem plan`` and the budget as a person uses them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from raymem.cli.main import run_app
from raymem.errors import BudgetExceeded
from raymem.memory.budget import bytes_text
from raymem.memory.trace import CATEGORIES, PHASES
from raymem.planner import Plan, plan_recipe
from raymem.planner.plot import spans
from raymem.recipe.load import load_recipe, parse_recipe
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


def plan_of(largest_bytes: int, device: str) -> Plan:
    """A plan with all phases whose numbers are as wide as ``largest_bytes`` allows."""
    phases: dict[str, dict[str, int]] = {}
    for at, phase in enumerate(PHASES):
        sizes: dict[str, int] = {}
        for number, name in enumerate(CATEGORIES):
            sizes[name] = largest_bytes // (1 + at + 3 * number)
        phases[phase] = {**sizes, "peak_bytes": sum(sizes.values())}
    peak = phases["backward"]
    terms: dict[str, int] = {}
    for name in CATEGORIES:
        terms[name] = peak[name]
    place = "base_model.model.model.layers.31.self_attn.q_proj.base_layer"
    held = {"name": place, "category": "activations", "operation": "aten::mm", "bytes": largest_bytes, "count": 1024}
    return Plan(
        device=device, gpu=None, num_workers=1, traced=True, note=None, peak_bytes=peak["peak_bytes"],
        step_peak_bytes=peak["peak_bytes"], terms=terms, term_peaks={**terms, "loss": 2 * terms["loss"]}, phases=phases,
        state={}, reserved_bytes=peak["peak_bytes"] + 7, capacity_bytes=peak["peak_bytes"] + 1234567,
        expandable_bytes=peak["peak_bytes"] + 7654321, outside_bytes=600 << 20, top=[held], timeline=[],
    )  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("largest_bytes", [(1 << 30) - 12345, 999 * (1 << 30) - 12345, 12345])
def test_no_number_is_cut_in_a_pipe_of_80_columns(
    recipe: Path, largest_bytes: int, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("raymem.runs.plan.plan_recipe", lambda *_, **__: plan_of(largest_bytes, device))
    assert run_app("plan", recipe, "--budget", "1TiB", "--json") in (0, 1)
    facts = json.loads(capsys.readouterr().out)
    assert run_app("plan", recipe, "--budget", "1TiB") in (0, 1)
    said = capsys.readouterr().out
    shown = ["load", "forward", "backward", "step"]
    numbers = [facts["phases"][phase][term] for phase in shown for term in (*CATEGORIES, "peak_bytes")]
    numbers += [facts[f"{term}_bytes"] for term in CATEGORIES] + [top["bytes"] for top in facts["top"]]
    others = [phase for phase in PHASES if phase not in shown]
    numbers += [facts["phases"][phase]["peak_bytes"] for phase in others] + [facts["peak_bytes"]]
    if device == "cuda":
        numbers += [facts[f"{name}_bytes"] for name in ("reserved", "expandable", "capacity", "outside")]
    for text, count in Counter(map(bytes_text, numbers)).items():
        assert len(re.findall(rf"(?<![\d.]){re.escape(text)}(?!\w)", said)) >= count, text
    assert "\u2026" not in said
    table = said[: said.index("before step:")].splitlines()
    assert max(map(len, table)) <= 80 and len(table) == len(CATEGORIES) + 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_lies_on_the_host_is_a_column(
    recipe: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    host: dict[str, int] = dict.fromkeys(map(str, CATEGORIES), 0)
    host |= {"optimizer": 123 << 20, "activations": 877 << 20}
    plan = dataclasses.replace(plan_of((1 << 30) - 12345, device), host_bytes=1000 << 20, host_terms=host)
    monkeypatch.setattr("raymem.runs.plan.plan_recipe", lambda *_, **__: plan)
    assert run_app("plan", recipe) == 0
    said = capsys.readouterr().out
    head, *rows = said[: said.index("load:")].splitlines()
    assert head.split() == ["at", "the", "peak", "host", "forward", "backward", "step"]
    assert len(rows) == len(CATEGORIES) + 1 and max(map(len, rows)) <= 80
    shown = [" ".join(row.split()[3:5]) for row in rows]
    assert shown == [bytes_text(size) for size in (*host.values(), 1000 << 20)]
    assert ("one memory" in said) == (device == "cpu")


def test_wide_shows_all_phases_whole(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(999 << 30, "cpu")
    monkeypatch.setattr("raymem.runs.plan.plan_recipe", lambda *_, **__: plan)
    assert run_app("plan", recipe, "--wide") == 0
    said = capsys.readouterr().out
    assert all(phase in said.splitlines()[0] for phase in PHASES)
    assert all(bytes_text(plan.phases[phase][term]) in said for phase in PHASES for term in CATEGORIES)
    assert plan.top[0]["name"] in said and "aten::mm" in said and "--wide" not in said


def test_a_real_plan_shows_each_peak_of_its_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("plan", recipe, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert run_app("plan", recipe) == 0
    said = capsys.readouterr().out
    assert all(bytes_text(phase["peak_bytes"]) in said for phase in facts["phases"].values())
    assert facts["phases"]


def test_advice_without_something_to_fit_into_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("plan", recipe, "--advise") == 1
    assert "--advise: there is nothing to fit into" in capsys.readouterr().err


def test_the_picture_names_its_phases() -> None:
    phases = ["forward", "forward", "backward", "forward", "step"]
    assert spans(phases) == [("forward", 0, 2), ("backward", 2, 3), ("forward", 3, 4), ("step", 4, 5)]
    assert spans([]) == []


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
    raw["data"]["sequence_length"] = 64
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw))
    loaded = load_recipe(path)
    with pytest.raises(BudgetExceeded, match=r"budget: 100KiB is less than .* by .*; the largest term is .* --force"):
        train.launch(loaded)
    assert not (tmp_path / "runs" / "r").exists()
    finished = train.launch(loaded, force=True)
    assert finished.predicted_peak_bytes == pytest.approx(finished.outcome.peak_bytes, rel=0.01)


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_training_predicts_for_the_rows_that_it_has(llama: Path, examples: Path, tmp_path: Path, packing: str) -> None:
    """Where every example fills its row, attention needs no mask, and the peak is that of text cut into rows."""
    text = " ".join((examples / "train.jsonl").read_text().split())
    rows = tmp_path / "long.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "w1", "completion": f" {text}"}) + "\n" for _ in range(8)))
    raw = {
        "model": {"name": str(llama)},
        "train": {"steps": 3, "global_batch": 4, "micro_batch": 2},
        "scaling": {"num_workers": 0},
        "tracking": "none",
        "budget": "1GiB",
        **run_fragment(examples, tmp_path / "runs"),
    }
    raw["data"] = {"train": str(rows), "sequence_length": 32, "packing": packing}
    recipe = parse_recipe({"name": "full", **raw})
    finished = train.launch(recipe)
    assert finished.predicted_peak_bytes is not None and finished.peak_bytes is not None
    assert finished.predicted_peak_bytes < plan_recipe(recipe).step_peak_bytes, "which knows no data"
    assert finished.predicted_peak_bytes == pytest.approx(finished.peak_bytes, rel=0.01)


def test_training_predicts_for_the_targets_that_it_has(tmp_path: Path) -> None:
    """Of long prompts with short answers the loss has few terms, and its chunks are small."""
    rows = tmp_path / "short.jsonl"
    lines = ({"prompt": "def add(a, b):\n" * 40, "completion": f" {number}"} for number in range(8))
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wide = {
        "model_type": "llama", "vocab_size": 1 << 15, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    raw = {
        "name": "few",
        "model": {"config": wide, "tokenizer": "demo"},
        "data": {"train": str(rows), "sequence_length": 512, "packing": "none"},
        "train": {"steps": 3, "global_batch": 2, "micro_batch": 2},
        "scaling": {"num_workers": 0},
        "storage": {"path": str(tmp_path / "runs")},
        "adapter": "lora",
        "tracking": "none",
        "budget": "4GiB",
    }
    recipe = parse_recipe(raw)
    finished = train.launch(recipe)
    assert finished.predicted_peak_bytes is not None and finished.peak_bytes is not None
    assert finished.predicted_peak_bytes < 0.97 * plan_recipe(recipe).step_peak_bytes, "which knows no data"
    assert finished.predicted_peak_bytes == pytest.approx(finished.peak_bytes, rel=0.01)

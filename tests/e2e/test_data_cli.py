"""``raymem data`` as a person meets it, and what ``raymem train`` says of its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from raymem.cli import console
from raymem.cli.main import run_app


@pytest.fixture
def recipe(tmp_path: Path, llama: Path) -> Path:
    rows = [{"prompt": "w1 w2", "completion": " w3 w4"}, {"prompt": "w5", "completion": ""}]
    for split, kept in (("train", rows), ("eval", rows[:1])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    raw = {
        "model": {"name": str(llama)},
        "data": {
            "train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "sequence_length": 16,
        },
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
        "scaling": {"num_workers": 0},
        "storage": {"path": str(tmp_path / "50%?" / "runs")},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_figures_and_examples(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app("data", recipe) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:3] == ["source", "rows", "examples"]
    assert shown[1].split()[:4] == ["train[0]", "2", "1", "1"]
    assert shown[2:4] == [
        f"train[0]: {tmp_path / 'train.jsonl'}",
        "  format prompt_completion, template: none (the texts as they are)",
    ]
    assert shown[4].startswith("  tokens of an example: half of them up to ")
    assert shown[5] == "  1 dropped: the completion is empty"
    assert shown[7] == "--- example 1 ---"
    assert shown[8].startswith("w1 w2[[") and shown[8].endswith("]]") and "w3 w4" in shown[8]
    assert len(shown) == 9

    assert run_app("data", recipe, "--show") == 0
    assert capsys.readouterr().out.splitlines() == shown
    for none in (["--show", "0"], ["--no-show"], ["0"]):
        command = ["data", recipe, *none, "--split", "eval", "--set", "data.sequence_length=8"]
        assert run_app(*command) == 0
        figures = capsys.readouterr().out.splitlines()
        assert len(figures) == 5 and figures[1].split()[:4] == ["eval[0]", "1", "1", "0"]

    assert run_app("data", recipe, "--split", "test") == 1
    assert "--split test: a recipe has train and eval" in capsys.readouterr().err


def test_colour_where_there_is_a_terminal(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(console.out, "_force_terminal", True)
    monkeypatch.setattr(console.out, "_color_system", console.out._color_system or 1)
    assert run_app("data", recipe) == 0
    shown = capsys.readouterr().out
    assert "[[" not in shown and "w3 w4" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert run_app("data", recipe) == 0
    assert "[[" in capsys.readouterr().out
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(console.out, "_color_system", None)  # a terminal that knows no colours
    assert run_app("data", recipe) == 0
    assert "[[" in capsys.readouterr().out


def test_training_says_the_same_and_uses_what_was_prepared(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app("data", recipe) == 0
    table = capsys.readouterr().out.splitlines()[:6]
    storage = tmp_path / "50%?" / "runs"
    prepared = {path.name for path in (storage / "cache" / "data").iterdir()}
    assert run_app("train", recipe) == 0
    shown = capsys.readouterr().out.splitlines()
    at = shown.index(table[0])
    assert shown[at : at + 6] == table and shown[at + 6] == "for example:" and "w1 w2[[" in shown[at + 7]
    assert prepared < {path.name for path in (storage / "cache" / "data").iterdir()}
    # Nothing lies beside the storage, tracking included.
    assert [path.name for path in (tmp_path / "50%?").iterdir()] == ["runs"]
    assert {path.name for path in tmp_path.iterdir()} == {"50%?", "tiny.yaml", "train.jsonl", "eval.jsonl"}
    assert (storage / "mlflow.db").is_file() and (storage / "mlartifacts").is_dir()


def test_an_error_about_the_tokenizer_names_the_path_that_was_given(
    recipe: Path, tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    assert run_app("data", recipe) == 1
    assert f"tokenizer {llama} has no chat template" in capsys.readouterr().err

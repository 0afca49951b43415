"""What a person does with a fresh result: the command of the last line, and predictions to read."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from raymem.cli.loram import evaluation_text
from raymem.cli.main import run_app
from raymem.cli.results.generate import command
from raymem.runs.suggest import Suggestion
from tests.helpers.run_files import write_recipe
from tests.helpers.speaking import save_speaker


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def last_line(shown: str) -> list[str]:
    words = shlex.split(shown.partition("\nnext: ")[2])
    assert words[:2] == ["raymem", "generate"]
    return words[1:]


def test_the_last_line_of_a_training_is_a_command_that_works(
    tmp_path: Path, llama: Path, examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tmp_path, llama, examples)
    for _ in range(2):  # the second time all is done already
        assert run_app("train", recipe) == 0
        words = last_line(capsys.readouterr().out)
        assert words[1] == str(tmp_path / "runs" / "tiny" / "adapter")
        first = json.loads((examples / "eval.jsonl").read_text().splitlines()[0])["text"]
        assert first.startswith(words[-1]) and "--raw" not in words
        assert run_app(*words, "--max-new-tokens", "4") == 0
        assert capsys.readouterr().out.strip()


def test_a_conversation_is_asked_as_it_was_trained_and_read_beside_its_reference(
    tmp_path: Path, examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speaker = save_speaker(tmp_path / "speaker", "blue\x1b sky")
    rows = [talk("one\n two?", "two three"), talk("three", "one")]
    data = {"train": lines(tmp_path / "talks.jsonl", *rows), "sequence_length": 64, "packing": "none"}
    data["eval"] = data["train"]
    train = {"steps": 1, "global_batch": 2, "micro_batch": 2}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path, speaker, examples, data=data, train=train)
    assert run_app("train", recipe, "-s", "optimizer.lr=1e-9") == 0
    shown = capsys.readouterr().out
    overrides = ["--set", "optimizer.lr=1e-9"]
    again = shlex.split(shown.partition("\nevaluate it: ")[2].partition("\n")[0])
    assert again == ["raymem", "evaluate", str(recipe), *overrides], "of this run, not of the recipe's own"
    words = last_line(shown)
    assert words[2:] == ["--prompt", "one\n two?"]
    assert run_app(*words) == 0
    assert capsys.readouterr().out == "blue\\x1b sky\n"

    assert run_app("evaluate", recipe, "--json") == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    assert [(one["prediction"], one["reference"]) for one in predictions] == [
        ("blue\x1b sky", "two three"),
        ("blue\x1b sky", "one"),
    ]
    assert predictions[0]["prompt"].endswith("<|im_start|>assistant\n")
    assert run_app("evaluate", recipe, "--predictions", "1", "--artifact", "base") == 0
    shown = capsys.readouterr().out
    assert "blue\\x1b sky" in shown and "--- prediction 1 ---" in shown and "prediction 2" not in shown
    assert max(map(len, shown.split("--- prediction 1 ---")[1].splitlines())) <= 100
    assert run_app("evaluate", recipe, "--predictions", "0", "--json") == 0
    assert "predictions" not in json.loads(capsys.readouterr().out)


def test_texts_on_a_model_with_a_template_are_continued_raw(
    tmp_path: Path, examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speaker = save_speaker(tmp_path / "speaker", " blue sky")
    data = {
        "train": lines(tmp_path / "texts.jsonl", {"text": "one two three sky word user blue"}),
        "sequence_length": 32,
    }
    train = {"steps": 1, "global_batch": 1, "micro_batch": 1}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path, speaker, examples, data=data, train=train)
    assert run_app("train", recipe) == 0
    words = last_line(capsys.readouterr().out)
    assert "--raw" in words and "one two three sky word user blue".startswith(words[-1])
    assert run_app(*words, "--max-new-tokens", "2") == 0


def test_a_suggested_command_is_safe_for_a_shell_and_short() -> None:
    assert command("/a b", None) == "raymem generate '/a b' --prompt Hello"
    found = shlex.split(command("d", Suggestion("$(rm -rf /) it's\x1b[2J", True, "be brief")))
    assert found == ["raymem", "generate", "d", "--system", "be brief", "--raw", "--prompt", "$(rm -rf /) it's [2J"]
    long = shlex.split(command("d", Suggestion("word " * 400, False, "s" * 200)))
    assert "--system" not in long and 80 < len(long[-1]) <= 120


def test_the_table_of_loram_says_what_is_kept() -> None:
    rows = {
        "full": {"loss": 2.0},
        "pruned": {"loss": 3.0},
        "pruned + adapter": {"loss": 2.5},
        "full + recovered": {"loss": 1.7},
    }
    assert "--with-lora" in evaluation_text(rows)
    shown = evaluation_text({**rows, "full + lora": {"loss": 1.6}})
    assert shown.endswith("LoRAM keeps 75% of what the adapter gains when it is trained on the full model")
    assert "full + recovered       1.7000        5.47    0.3000" in shown
    judged = {name: {**row, "scores": {"data.eval[0]/f1": row["loss"] / 10}} for name, row in rows.items()}
    scored = "data.eval[0]/f1: full 0.2000, pruned 0.3000, pruned + adapter 0.2500, full + recovered 0.1700"
    assert scored in evaluation_text(judged).splitlines()
    assert "no share to keep" in evaluation_text({**rows, "full + lora": {"loss": 2.1}})
    assert all(len(line) <= 80 for line in shown.splitlines()[:-1])

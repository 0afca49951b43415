"""``evaluate --tasks``: what lm-evaluation-harness says of the same adapter on the same base, asked by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from raymem.cli.main import run_app
from raymem.errors import DataError, RecipeError
from raymem.runs.evaluate import evaluate_recipe
from raymem.runs.inference.tasks import Asked, evaluate_tasks, known_tasks
from tests.helpers.support import make_recipe, run_fragment, train

WORDS = """\
task: tiny_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
  do_sample: false
filter_list:
  - name: number
    filter:
      - function: regex
        regex_pattern: "(-?[0-9]+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: 1
doc_to_choice: ["no", "{{{{answer}}}}"]
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'raymem[eval]'")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("words", WORDS), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return folder


def by_hand(base: Path, adapter: Path, names: list[str], tasks: Path) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(base), "peft": str(adapter), "dtype": "float32", "device": "cpu"},
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks)),
        batch_size=8,
        log_samples=False,
    )
    assert found is not None
    results: dict[str, Any] = found["results"]
    return results


@pytest.mark.slow
def test_an_adapter_scores_as_by_hand(llama: Path, examples: Path, tasks: Path, tmp_path: Path) -> None:
    recipe = make_recipe(run_fragment(examples, tmp_path), model=llama)
    outcome, _ = train(recipe)
    assert outcome is not None
    asked = Asked(["tiny_*"], include_path=tasks)
    scores = evaluate_tasks(recipe, None, asked, status=lambda text: None)
    expected = by_hand(llama, Path(outcome.artifact), ["tiny_choice", "tiny_words"], tasks)
    found = {(score.task, score.metric): score.value for score in scores}
    assert found.keys() == {
        ("tiny_choice", "acc,none"), ("tiny_choice", "acc_norm,none"), ("tiny_words", "exact_match,number"),
    }  # fmt: skip
    assert found == {key: expected[key[0]][key[1]] for key in found}
    errors = {(score.task, score.metric): score.stderr for score in scores}
    assert errors["tiny_choice", "acc,none"] == expected["tiny_choice"]["acc_stderr,none"]
    base = {s.metric: s.value for s in evaluate_tasks(recipe, "base", asked, status=lambda text: None)}
    assert base.keys() == {metric for _, metric in found}


@pytest.mark.slow
def test_a_metric_of_one_s_own_data_agrees_on_the_same_rows(llama: Path, tasks: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{n} w50 w{n}", "completion": f" w{2 * n}", "number": str(2 * n)} for n in range(1, 17)]
    for name, part in (("known.jsonl", rows[:9]), ("rows.jsonl", rows)):  # some are learned, and some are not
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    text = WORDS.format(file=tmp_path / "rows.jsonl").replace("Question: {{question}}\\nAnswer:", "{{prompt}}")
    (tasks / "words.yaml").write_text(text.replace("{{answer}}", "{{number}}"))
    recipe = make_recipe(
        {
            "data": {
                "train": str(tmp_path / "known.jsonl"),
                "eval": {"path": str(tmp_path / "rows.jsonl"), "metric": "numeric"},
            },
            "adapter": "none",
            "optimizer": {"lr": 5e-3},
            "train": {"steps": 150, "global_batch": 9, "micro_batch": 9},
            "storage": {"path": str(tmp_path / "runs")},
        },
        model=llama,
    )
    train(recipe)
    (score,) = evaluate_tasks(recipe, None, Asked(["tiny_words"], include_path=tasks), status=lambda text: None)
    (own,) = evaluate_recipe(recipe).result.scores
    assert 0 < own.value < 1 and own.count == len(rows)
    assert own.value == pytest.approx(score.value)


def test_what_is_no_task_is_named_with_what_is_near(tasks: Path) -> None:
    with pytest.raises(RecipeError, match=r"'tiny_word' is no task of lm-evaluation-harness; near names: tiny_words"):
        known_tasks(Asked(["tiny_word"], include_path=tasks))
    with pytest.raises(RecipeError, match="--include-path: nowhere is no directory"):
        known_tasks(Asked(["tiny_words"], include_path=Path("nowhere")))


@pytest.mark.slow
def test_data_that_are_not_there_are_a_sentence(llama: Path, examples: Path, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").unlink()
    recipe = make_recipe(run_fragment(examples, tmp_path), model=llama)
    with pytest.raises(DataError, match=r"--tasks: tiny_words cannot be asked \(.*\); check its data"):
        evaluate_tasks(recipe, "base", Asked(["tiny_words"], include_path=tasks), status=lambda text: None)


def test_without_the_harness_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"--tasks needs lm-evaluation-harness .*; pip install 'raymem\[eval\]'"):
        known_tasks(Asked(["gsm8k"]))


def test_options_of_tasks_without_tasks_are_refused(
    examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(json.dumps(make_recipe(run_fragment(examples, tmp_path)).to_dict()))
    assert run_app("evaluate", str(recipe), "--limit", "5") == 1
    assert "--limit goes with --tasks alone; add --tasks, or leave it out" in capsys.readouterr().err

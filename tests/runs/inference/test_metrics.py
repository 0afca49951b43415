"""``data.eval`` with ``metric``: the model answers every example, and is judged by what the example says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import raymem
from raymem.cli.main import run_app
from raymem.errors import DataError, RecipeError
from raymem.metrics import scores
from raymem.recipe.load import recipe_of
from raymem.runs.evaluate import evaluate_recipe
from raymem.training.artifacts.generate import continued, stop_ids
from raymem.training.data.chat.template import Template
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.predictions import answers
from tests.helpers.support import make_recipe, train


def recipe_with(sums: Path, storage: Path, llama: Path, **fragments: Any) -> Any:
    data = {"train": str(sums), "eval": {"sums": {"path": str(sums), "metric": ["exact_match", "numeric", "f1"]}}}
    steps = {"train": {"steps": 2, "micro_batch": 3, "global_batch": 3}}
    return make_recipe({"data": data, "storage": {"path": str(storage)}}, steps, fragments, model=llama)


def test_answers_in_batches_are_those_of_single_prompts_and_are_what_is_judged(
    sums: Path, llama: Path, tmp_path: Path
) -> None:
    recipe = recipe_with(sums, tmp_path / "runs", llama)
    outcome, _ = train(recipe)
    assert outcome is not None
    found = evaluate_recipe(recipe).result
    assert [(score.where, score.metric, score.count) for score in found.scores] == [
        ("data.eval.sums", metric, 7) for metric in ("exact_match", "numeric", "f1")
    ]
    model, tokenizer = raymem.load(outcome.artifact)
    (directory,) = [path.parent for path in (tmp_path / "runs" / "cache" / "data").glob("*/manifest.json")]
    rows = PackedRows([(directory, 1.0)])
    pairs = answers(model, rows, tokenizer, micro_batch=3, mixed=False, progress=lambda: None)
    assert sorted(reference for _, reference in pairs) == sorted(f"w{2 * n}" for n in range(1, 8))
    assert [score.value for score in scores("data.eval.sums", ["exact_match", "numeric", "f1"], pairs)] == [
        score.value for score in found.scores
    ]
    alone = answers(model, rows, tokenizer, micro_batch=1, mixed=False, progress=lambda: None)
    stops = stop_ids(model, tokenizer, Template(tokenizer, ""))
    prompt = tokenizer("w3 w50 w3")["input_ids"]
    new = continued(model, tokenizer, prompt, stops, max_new_tokens=8)
    text = tokenizer.decode([token for token in new if token not in stops], skip_special_tokens=True).strip()
    (said,) = [answer for answer, reference in alone if reference == "w6"]
    assert text and said.startswith(text)
    assert alone == pairs


def test_the_command_prints_them_and_names_them_in_json(
    sums: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with(sums, tmp_path / "runs", llama)
    train(recipe)
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps(recipe.to_dict()))
    assert run_app("evaluate", str(file), "--predictions", "0") == 0
    assert "data.eval.sums: numeric 0." in capsys.readouterr().out
    assert run_app("evaluate", str(file), "--predictions", "0", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert 0 <= figures["data.eval.sums/f1"] <= 1 and figures["eval_loss"] > 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"eval": {"path": "x.jsonl", "metric": "bleurt"}}, "'bleurt' is no metric"),
        ({"train": {"path": "x.jsonl", "metric": "f1"}}, "only sources of data.eval have metrics"),
        ({"eval": {"path": "x.jsonl", "metric": "f1"}, "packing": "wrapped"}, "packing: wrapped cuts examples"),
        ({"eval": {"path": "x.jsonl", "metric": "f1", "format": "text"}}, "format: text has no answers"),
    ],
)
def test_metrics_that_mean_nothing_are_refused(data: dict[str, Any], words: str) -> None:
    raw = {"name": "x", "model": {"name": "org/base"}, "data": {"train": "x.jsonl", **data}, "train": {"steps": 1}}
    with pytest.raises(RecipeError, match=words):
        recipe_of(raw)


def test_plain_texts_have_no_answers(llama: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"some words and {n}"}) + "\n" for n in range(6)))
    recipe = recipe_with(texts, tmp_path / "runs", llama)
    train(recipe)
    with pytest.raises(DataError, match=r"data\.eval\.sums\.metric: plain texts have no answers"):
        evaluate_recipe(recipe)

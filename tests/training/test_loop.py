"""Whole runs in one process: resuming is exact, the best weights leave, and bad numbers stop in time."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raymem.errors import CheckpointError, NonFiniteError
from raymem.recipe.schema import Recipe
from raymem.training import loop
from raymem.training.checkpoint import latest_manifest
from raymem.training.evaluate import Evaluation, evaluate
from raymem.training.loop import METERED_STEPS
from raymem.training.step import train_step
from tests.helpers.support import assert_same, column, make_recipe, run_fragment, run_storage, train

STEPS = {"train": {"steps": 4, "save_every": 2}}
SIX = {"train": {"steps": 6}}
FULL = {"adapter": {"kind": "none"}}


@pytest.fixture
def recipe_for(llama: Path, examples: Path, tmp_path: Path) -> Any:
    """Makes recipes whose runs lie in directories of their own."""

    def make(run: str, *fragments: dict[str, Any], evaluated: bool = False) -> Recipe:
        place = run_fragment(examples, tmp_path, evaluated=evaluated)
        return make_recipe(STEPS, place, {"name": run}, *fragments, model=llama)

    return make


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Tensors of the run's result."""
    (path,) = Path(run_storage(recipe).root).glob("*/*model.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    "fragment",
    [
        {"adapter": {"dropout": 0.2}},
        FULL,
        {"activations": "checkpoint", "adapter": {"dropout": 0.2}},
        {"train": {"precision": "bf16", "master": "fp32"}},
        {"train": {"precision": "bf16", "master": "stochastic_rounding"}, **FULL},
    ],
    ids=["lora", "full", "checkpointing", "master", "full rounding"],
)
def test_a_stopped_and_resumed_run_is_the_straight_one(recipe_for: Any, fragment: dict[str, Any]) -> None:
    straight, stopped = recipe_for("straight", fragment), recipe_for("stopped", fragment)
    outcome, rows = train(straight)
    nothing, first = train(stopped, stop_after=3)
    assert nothing is None
    resumed, second = train(stopped)
    assert outcome is not None and resumed is not None
    assert (outcome.started_at, resumed.started_at) == (0, 2)
    for name in ("loss", "grad_norm", "lr", "epoch"):
        assert column(first + second, name) == column(rows, name), "step 3 was done twice, alike"
    assert len(column(rows)) == 4
    assert_same(weights(stopped), weights(straight))


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(recipe_for: Any) -> None:
    straight, damaged = recipe_for("straight"), recipe_for("damaged", {"train": {"save_every": 1}})
    train(straight)
    train(damaged, stop_after=3)
    newest = latest_manifest(run_storage(damaged))
    assert newest is not None
    (path,) = Path(run_storage(damaged).join("checkpoints", f"step_{newest.step:08d}")).glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    outcome, _ = train(damaged)
    assert outcome is not None and outcome.started_at == newest.step - 1
    assert_same(weights(damaged), weights(straight))


def test_a_mix_of_formats_resumes_bit_for_bit_and_not_under_another_mix(
    recipe_for: Any, examples: Path, tmp_path: Path
) -> None:
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps({"input_ids": [n % 90, 5, 6, 7]}) + "\n" for n in range(12)))
    packed = tmp_path / "text.jsonl.gz"
    packed.write_bytes(gzip.compress((examples / "train.jsonl").read_bytes()))
    data = {"train": [str(packed), {"path": str(ids), "weight": 2}], "mix": {"by": "tokens", "temperature": 3}}
    straight, stopped = recipe_for("straight", {"data": data}), recipe_for("stopped", {"data": data})
    _, rows = train(straight)
    _, first = train(stopped, stop_after=3)
    _, second = train(stopped)
    assert column(first + second) == column(rows)
    assert_same(weights(stopped), weights(straight))
    with pytest.raises(CheckpointError, match=r"started with data\.train="):
        train(recipe_for("stopped", {"data": {**data, "mix": {"temperature": 3}}}))


def test_the_loss_falls(recipe_for: Any) -> None:
    _, rows = train(recipe_for("run", FULL, {"train": {"steps": 20, "save_every": 20}}))
    losses = column(rows)
    assert losses[0] == pytest.approx(math.log(128), rel=0.1), "untrained: as good as guessing"
    assert losses[-1] < 0.9 * losses[0]


def test_a_finished_run_reports_again_and_changes_nothing(recipe_for: Any) -> None:
    recipe = recipe_for("run", evaluated=True)
    first, _ = train(recipe)
    before = weights(recipe)
    manifest = latest_manifest(run_storage(recipe))
    again, rows = train(recipe)
    assert first is not None and again is not None
    assert (again.steps, again.started_at, again.loss) == (4, 4, None)
    assert (again.artifact, again.eval_loss, again.eval_perplexity) == (
        first.artifact, first.eval_loss, first.eval_perplexity)  # fmt: skip
    assert_same(weights(recipe), before)
    assert latest_manifest(run_storage(recipe)) == manifest
    assert {row["step"] for row in rows} <= {3.0, 4.0}, "what the last checkpoint remembers, and no new step"


def test_a_finished_run_goes_on_when_it_is_made_longer(recipe_for: Any) -> None:
    constant = {"train": {"schedule": "constant", "warmup": 0}}
    train(recipe_for("run", constant))
    longer, _ = train(recipe_for("run", constant, {"train": {"steps": 6}}))
    train(recipe_for("straight", constant, {"train": {"steps": 6}}))
    assert longer is not None and longer.started_at == 4
    assert_same(weights(recipe_for("run")), weights(recipe_for("straight")))


def test_an_epoch_is_every_row_once(recipe_for: Any) -> None:
    outcome, rows = train(recipe_for("run", {"train": {"steps": None, "epochs": 1.5, "save_every": None}}))
    assert outcome is not None
    epochs = column(rows, "epoch")
    assert epochs[-2] < 1.5 <= epochs[-1]
    assert len(rows) == outcome.steps


def test_rows_and_outcome_say_what_happened(recipe_for: Any) -> None:
    recipe = recipe_for("run", {"train": {"eval_every": 3}}, evaluated=True)
    outcome, rows = train(recipe, metered_steps=METERED_STEPS)
    assert outcome is not None
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 4]
    assert [row["step"] for row in rows if "peak_bytes" in row] == list(METERED_STEPS)
    assert outcome.loss == rows[-1]["loss"] and outcome.eval_loss == rows[-1]["eval_loss"]
    assert outcome.eval_perplexity == pytest.approx(math.exp(rows[-1]["eval_loss"]))
    peaks = column(rows, "peak_bytes")
    assert outcome.peak_bytes == max(peaks) > 0
    facts = json.loads((Path(outcome.artifact) / "raymem.json").read_text())
    assert (facts["step"], facts["eval_loss"]) == (4, outcome.eval_loss)
    assert Recipe.model_validate(facts["recipe"]) == recipe
    json.dumps(outcome.to_dict())


def test_a_run_that_is_resumed_at_its_end_still_says_what_it_took(recipe_for: Any) -> None:
    """One step is left, and the first of a session is not metered."""
    recipe = recipe_for("run", {"train": {"save_every": 3}})
    _, first = train(recipe, stop_after=4, metered_steps=METERED_STEPS)
    outcome, second = train(recipe, metered_steps=METERED_STEPS)
    assert outcome is not None and outcome.started_at == 3
    assert outcome.peak_bytes == max(column(first, "peak_bytes")) > 0
    assert outcome.earlier_s >= first[2]["elapsed_s"] > 0
    assert second[-1]["elapsed_s"] > outcome.earlier_s, "of both sessions"
    again, _ = train(recipe)
    assert again is not None and again.peak_bytes == outcome.peak_bytes and again.earlier_s > outcome.earlier_s


def test_nan_stops_with_its_step_and_keeps_the_last_good_checkpoint(
    recipe_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for("run")
    original = train_step

    def broken(model: Any, batches: Any, targets: int, updater: Any, step: int, *args: Any, **options: Any) -> Any:
        return original(model, batches, math.nan if step == 2 else targets, updater, step, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 3; .*the checkpoint of step 2 is kept"):
        train(recipe)
    monkeypatch.undo()
    outcome, rows = train(recipe)
    assert outcome is not None and outcome.started_at == 2
    _, straight = train(recipe_for("straight"))
    assert column(rows)[-2:] == column(straight)[-2:]


def test_nan_before_the_first_checkpoint_says_that_there_is_none(recipe_for: Any) -> None:
    recipe = recipe_for("run", FULL, {"optimizer": {"lr": 1e30}, "train": {"warmup": 0}})
    with pytest.raises(NonFiniteError, match=r"at step 2; .*there is no checkpoint yet.*lower optimizer\.lr"):
        train(recipe)
    assert latest_manifest(run_storage(recipe)) is None


def test_the_best_checkpoint_leaves(recipe_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    best = recipe_for("best", SIX, {"storage": {"keep": "best", "num_to_keep": 1}}, evaluated=True)
    short = recipe_for("short", SIX, evaluated=True)
    losses = iter([0.9, 0.1, 0.5])

    def scripted(*args: Any, **options: Any) -> Any:
        return Evaluation(next(losses), evaluate(*args, **options).num_targets)

    monkeypatch.setattr(loop, "evaluate", scripted)
    outcome, _ = train(make_like(best, eval_every=2))
    monkeypatch.undo()
    assert outcome is not None
    assert outcome.eval_loss == 0.1
    assert json.loads((Path(outcome.artifact) / "raymem.json").read_text())["step"] == 4
    train(short, stop_after=5)  # its last checkpoint is that of step 4
    manifest = latest_manifest(run_storage(short))
    assert manifest is not None and manifest.step == 4
    stored = load_file(next(Path(run_storage(short).join("checkpoints", "step_00000004")).glob("*.safetensors")))
    found = weights(best)
    for name, value in stored.items():
        if name.startswith("weights."):
            assert torch.equal(found[name.removeprefix("weights.").replace(".default", "")], value)
    again, _ = train(make_like(best, eval_every=2))
    assert again is not None and (again.eval_loss, again.loss) == (0.1, None)
    assert_same(weights(best), found)


def test_named_evaluation_is_logged_by_name_and_ranked_by_the_mean(recipe_for: Any, examples: Path) -> None:
    data = {"eval": {"a": str(examples / "eval.jsonl"), "b": [str(examples / "train.jsonl")]}}
    recipe = recipe_for("run", SIX, {"data": data, "storage": {"keep": "best"}})
    outcome, rows = train(make_like(recipe, eval_every=2))
    assert outcome is not None
    evaluated = [row for row in rows if "eval_loss" in row]
    assert len(evaluated) == 3
    for row in evaluated:
        low, high = sorted((row["eval_loss/a"], row["eval_loss/b"]))
        assert low < row["eval_loss"] < high
    assert outcome.eval_loss == min(row["eval_loss"] for row in evaluated)


def make_like(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def test_another_recipe_under_the_same_name_is_refused(recipe_for: Any) -> None:
    train(recipe_for("run"))
    with pytest.raises(CheckpointError, match=r"run/checkpoints: this run was started with adapter\.rank=.*--fresh"):
        train(recipe_for("run", {"adapter": {"rank": 2}}))


def test_training_does_not_depend_on_the_global_stream(recipe_for: Any) -> None:
    dropout = {"adapter": {"dropout": 0.3}}
    _, first = train(recipe_for("one", dropout))
    torch.manual_seed(12345)
    _, second = train(recipe_for("two", dropout))
    _, other = train(recipe_for("three", dropout, {"seed": 1}))
    assert column(first) == column(second) != column(other)


def test_a_run_made_shorter_than_it_is_stays_what_it_is(recipe_for: Any) -> None:
    train(recipe_for("run", evaluated=True))
    before = weights(recipe_for("run"))
    outcome, _ = train(recipe_for("run", {"train": {"steps": 2}}, evaluated=True))
    assert outcome is not None
    assert outcome.steps == outcome.started_at == 4
    assert json.loads((Path(outcome.artifact) / "raymem.json").read_text())["step"] == 4
    assert_same(weights(recipe_for("run")), before)

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.training.data.packed.dataset import PackedRows
from raymem.training.dist_env import DistEnv
from raymem.training.evaluate import Evaluation, evaluate, evaluation_rows
from raymem.training.model.build import build_model
from tests.helpers.support import make_recipe, prepare_split, run_fragment


@pytest.fixture
def rows_of(llama: Path, examples: Path, tmp_path: Path) -> Any:
    def make(packing: str) -> PackedRows:
        where = run_fragment(examples, tmp_path, evaluated=True)
        return PackedRows(
            prepare_split(make_recipe(where, {"data": {"packing": packing}}, model=llama), "eval").directories
        )

    return make


def by_hand(model: Any, rows: PackedRows) -> float:
    """Mean over all targets, one segment of one row at a time."""
    total, count = 0.0, 0
    for index in range(len(rows)):
        row = rows.row(index)
        starts = [*row.starts.nonzero()[0].tolist(), len(row.input_ids)]
        for begin, end in itertools.pairwise(starts):
            ids = torch.tensor(row.input_ids[begin:end].astype("int64"))[None]
            with torch.no_grad():
                chances = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            for at in range(1, end - begin):
                if row.targets[begin + at]:
                    total -= float(chances[at - 1, ids[0, at]])
                    count += 1
    assert count == rows.num_targets.sum()
    return total / count


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_the_loss_is_the_mean_over_every_target(rows_of: Any, llama: Path, packing: str) -> None:
    rows = rows_of(packing)
    model = build_model(make_recipe({"adapter": {"kind": "none"}}, model=llama))
    expected = by_hand(model, rows)
    for micro_batch in (1, 3, 100):
        found = evaluate(model, rows, DistEnv(), micro_batch=micro_batch, mixed=False)
        assert found.loss == pytest.approx(expected, rel=1e-5)
        assert found.num_targets == rows.num_targets.sum()
        assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_evaluation_is_without_dropout_and_leaves_the_mode(rows_of: Any, llama: Path) -> None:
    model = build_model(make_recipe({"adapter": {"dropout": 0.5}}, model=llama))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    rows = rows_of("bfd")
    first, second = (evaluate(model, rows, DistEnv(), micro_batch=2, mixed=False) for _ in range(2))
    assert first == second
    assert model.training
    model.eval()
    assert evaluate(model, rows, DistEnv(), micro_batch=2, mixed=False) == first
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_names_have_losses_of_their_own_and_share_one_mean(llama: Path, examples: Path, tmp_path: Path) -> None:
    first, second = str(examples / "eval.jsonl"), str(examples / "train.jsonl")
    model = build_model(make_recipe({"adapter": {"kind": "none"}}, model=llama))

    def measured(sources: Any) -> Evaluation:
        where = run_fragment(examples, tmp_path)
        where["data"]["eval"] = sources
        rows = evaluation_rows(prepare_split(make_recipe(where, model=llama), "eval"))
        return evaluate(model, rows, DistEnv(), micro_batch=3, mixed=False)

    alone = [measured(source) for source in (first, second)]
    named = measured({"held-out": first, "seen": {"path": second}})
    assert [named.by_name["held-out"], named.by_name["seen"]] == alone
    together = measured([first, second])
    assert not together.by_name and set(together.metrics) == {"eval_loss", "eval_perplexity"}
    assert named.num_targets == together.num_targets
    assert named.loss == pytest.approx(together.loss, rel=1e-6)
    total = sum(part.loss * part.num_targets for part in alone)
    assert named.loss == pytest.approx(total / named.num_targets, rel=1e-12)
    assert named.metrics == {
        "eval_loss": named.loss,
        "eval_perplexity": named.perplexity,
        "eval_loss/held-out": alone[0].loss,
        "eval_loss/seen": alone[1].loss,
    }
    # Several sources of one name count as one.
    assert measured({"all": [first, second]}).by_name["all"].loss == pytest.approx(together.loss, rel=1e-6)


def test_a_hopeless_loss_still_has_a_perplexity() -> None:
    assert math.isfinite(Evaluation(1e6, 1).perplexity)

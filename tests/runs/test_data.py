from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raymem.planner import RowFacts
from raymem.recipe.load import parse_recipe
from raymem.recipe.schema import Recipe
from raymem.runs import data as module
from raymem.runs.data import row_facts
from raymem.training.data.batches import rank_batches
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shards import Prepared, prepare
from raymem.training.loop import sampler_of, total_steps

S = 16
LENGTHS = (3, 9, 30, 5, 14, 2, 40, 7, 11, 4, 25, 6)
"""Words of the completions."""


@pytest.fixture
def make(llama: Path, tmp_path: Path) -> Any:
    """Return a run's recipe and its prepared rows."""
    data = tmp_path / "rows.jsonl"
    lines = ({"prompt": "w1", "completion": " w2" * length} for length in LENGTHS)
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(packing: str) -> tuple[Recipe, Prepared]:
        raw = {
            "name": "facts",
            "model": {"name": str(llama)},
            "data": {"train": str(data), "sequence_length": S, "packing": packing},
            "train": {"steps": 5, "global_batch": 4, "micro_batch": 2},
            "scaling": {"num_workers": 2},
        }
        recipe = parse_recipe(raw)
        return recipe, prepare(recipe.data, "train", str(llama), tmp_path)

    return run


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_the_facts_are_those_of_the_batches_that_the_run_takes(make: Any, packing: str) -> None:
    recipe, data = make(packing)
    rows = PackedRows(data.directories)
    sampler = sampler_of(recipe, rows)
    steps = range(1, total_steps(recipe, data))
    batches = [one for step in steps for rank in (0, 1) for one in rank_batches(rows, sampler.ids(step), rank, 2, 1)]
    counts = [0 if batch.target_positions is None else len(batch.target_positions) for batch in batches]
    assert len(set(counts)) > 1 or packing == "wrapped"
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": 1})})
    assert row_facts(recipe, data) == RowFacts(packing != "wrapped", max(counts))


def test_a_long_run_is_taken_to_meet_its_largest_rows_at_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, data = make("none")
    largest = sorted(PackedRows(data.directories).num_targets)[-2:]
    monkeypatch.setattr(module, "_ROWS_LOOKED_AT", 8)
    assert row_facts(recipe, data) == RowFacts(True, int(sum(largest)))
    recipe, data = make("wrapped")
    assert row_facts(recipe, data) == RowFacts(False, 2 * (S - 1))

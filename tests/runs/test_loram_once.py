"""A stage of LoRAM opens the full model once and prepares what it trains on once: both take time with a large one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.methods.loram import source as source_module
from raymem.methods.loram.config import LoRAMOptions
from raymem.runs.loram.pipeline import Pipeline
from raymem.storage.safetensors_io import fingerprint
from raymem.sweeps import trial as trial_module
from raymem.sweeps.trial import TrialJob
from raymem.training.data.packed import shards
from raymem.training.data.packed.shards import prepare
from tests.helpers.loram_runs import STAGES, loram_recipe, run_stages


@pytest.fixture
def counts(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Openings of the full model, and preparations by split and first file."""
    found: Counter[str] = Counter()

    def counting_fingerprint(directory: Path, file: str) -> Any:
        found["opened"] += directory == llama
        return fingerprint(directory, file)

    def counting_prepare(section: Any, split: Any, *arguments: Any) -> Any:
        found[split] += 1
        return prepare(section, split, *arguments)

    monkeypatch.setattr(source_module, "fingerprint", counting_fingerprint)
    monkeypatch.setattr(shards, "prepare", counting_prepare)
    return found


def counted(counts: Counter[str], work: Callable[[], object]) -> tuple[int, int, int]:
    counts.clear()
    work()
    return counts["opened"], counts["train"], counts["eval"]


@pytest.mark.parametrize("kind", ["lora", "moram"])
def test_every_stage_opens_and_prepares_once(
    kind: str, counts: Counter[str], llama: Path, examples: Path, tmp_path: Path
) -> None:
    adapter = {"kind": "moram", "rank": 4, "density": 0.25, "selection_batches": 1} if kind == "moram" else {}
    recipe = loram_recipe(llama, examples, tmp_path, adapter=adapter)
    expected = {
        "prune": (1, 1, 0),  # calibration texts
        "align": (1, 2, 1),  # and what it is aligned on
        "train": (1, 3, 1),  # and what it is trained on
        "recover": (1, 2, 0),
        "verify": (1, 2, 0),
        "evaluate": (1, 2, 1),
    }
    for stage, once in expected.items():
        pipeline = Pipeline(recipe)
        assert (stage, counted(counts, getattr(pipeline, stage))) == (stage, once)
    whole = Pipeline(recipe)
    assert counted(counts, lambda: run_stages(whole, STAGES))[0] == 1


def test_so_does_a_trial_of_a_sweep(counts: Counter[str], llama: Path, examples: Path, tmp_path: Path) -> None:
    job = TrialJob(0, {}, 1, 0, 0, {}, None, "id")

    def trial(name: str) -> Callable[[], object]:
        recipe = loram_recipe(llama, examples, tmp_path, align=False).model_copy(update={"name": name})
        return lambda: trial_module._train(recipe, job, lambda rows: None)

    assert counted(counts, trial("first")) == counted(counts, trial("second")) == (1, 2, 1)


def test_a_pruned_model_that_the_recipe_names_is_held_against_the_full_one_once(
    counts: Counter[str], llama: Path, examples: Path, tmp_path: Path
) -> None:
    pruned = Pipeline(loram_recipe(llama, examples, tmp_path, align=False)).prune().directory
    recipe = loram_recipe(llama, examples, tmp_path, align=False)
    recipe = recipe.model_copy(update={"base": LoRAMOptions(artifact=str(pruned))})
    for stage, once in {"prune": (1, 0, 0), "train": (1, 1, 1), "recover": (1, 0, 0), "evaluate": (1, 0, 1)}.items():
        pipeline = Pipeline(recipe)
        assert (stage, counted(counts, getattr(pipeline, stage))) == (stage, once)

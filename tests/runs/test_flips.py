"""A flipped bit of what raymem wrote is never another result: some of each kind; tests/faults/flips.py tries more."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from raymem.training import loop
from tests.faults.flips import Arena, Flip, files_of, flip

EXPECTED = {
    "done/adapter/adapter_model.safetensors": ("adapter", "detected"),
    "done/adapter/adapter_config.json": ("adapter", "detected"),
    "done/adapter/tokenizer.json": ("adapter", "detected"),
    "done/adapter/raymem.json": ("adapter", "detected"),
    "done/adapter/raymem.sha256": ("adapter", "detected"),
    "merged/model.safetensors": ("merged", "detected"),
    "cut/checkpoints/step_00000002/shard-00001-model-00001-of-00001.safetensors": (
        "interrupted run, keep: last",
        "detected",
    ),
    "sweep/sweep.json": ("sweep", "detected"),
    "sweep/trial/trial.json": ("sweep", "detected"),
}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    before = dict(loop.run.__kwdefaults__ or {})
    yield Arena(tmp_path_factory.mktemp("arena"), ("adapter", "interrupted", "sweep"))
    loop.run.__kwdefaults__ = before


def flipped_in_the_middle(arena: Arena, use_name: str, file: str) -> Flip:
    (use,) = [use for use in arena.uses if use.name == use_name]
    path = f"store/{file}"
    return flip(arena, use, path, 8 * ((arena.pristine / path).stat().st_size // 2) + 3)


@pytest.mark.parametrize("file", EXPECTED)
def test_a_flipped_bit_is_never_another_result(arena: Arena, file: str) -> None:
    name, kind = EXPECTED[file]
    flipped = flipped_in_the_middle(arena, name, file)
    assert flipped.kind == kind, flipped.said
    if kind == "detected":
        assert re.search(r"SHA-256|raymem\.sha256|not JSON|damaged", flipped.said), flipped.said


def test_the_history_is_only_shown(arena: Arena) -> None:
    """It has times in it, so that the bit is one of a figure or of what makes a line JSON, which is warned of."""
    assert flipped_in_the_middle(arena, "finished run", "done/metrics.jsonl").kind in ("no effect", "rebuilt")


def test_prepared_data_are_made_again(arena: Arena) -> None:
    (use,) = [use for use in arena.uses if use.name == "finished run"]
    (file,) = [file for file in files_of(arena, use) if file.endswith("tokenizer_config.json") and "cache" in file][:1]
    assert flip(arena, use, file, 100).kind == "rebuilt"

"""A flipped bit of what raymem wrote is never another result: some of each kind; tests/faults/flips.py tries more."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from raymem.training import loop
from tests.faults.flips import Arena, files_of, flip

EXPECTED = {
    "done/adapter/adapter_model.safetensors": ("adapter", "detected"),
    "done/adapter/adapter_config.json": ("adapter", "detected"),
    "done/adapter/tokenizer.json": ("adapter", "detected"),
    "done/adapter/raymem.json": ("adapter", "detected"),
    "done/adapter/raymem.sha256": ("adapter", "detected"),
    "merged/model.safetensors": ("merged", "detected"),
    "done/metrics.jsonl": ("finished run", "no effect"),
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


@pytest.mark.parametrize("file", EXPECTED)
def test_a_flipped_bit_is_never_another_result(arena: Arena, file: str) -> None:
    name, kind = EXPECTED[file]
    (use,) = [use for use in arena.uses if use.name == name]
    path = f"store/{file}"
    bit = 8 * ((arena.pristine / path).stat().st_size // 2) + 3
    flipped = flip(arena, use, path, bit)
    assert flipped.kind == kind, flipped.said
    if kind == "detected":
        assert re.search(r"SHA-256|raymem\.sha256|not JSON|damaged", flipped.said), flipped.said


def test_prepared_data_are_made_again(arena: Arena) -> None:
    (use,) = [use for use in arena.uses if use.name == "finished run"]
    (file,) = [file for file in files_of(arena, use) if file.endswith("tokenizer_config.json") and "cache" in file][:1]
    assert flip(arena, use, file, 100).kind == "rebuilt"

"""Memory of preparing data: bounded by a block, whatever the size of the file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from raymem.recipe.data import DataSection
from raymem.training.data import readers
from raymem.training.data.packed import shards
from raymem.training.data.packed.shards import prepare
from tests.helpers.resident import status_bytes
from tests.helpers.support import in_processes

MIB = 1 << 20
WORDS = [f"{a}{b}" for a in ("one", "two", "three", "sky", "of", "value") for b in ("", "s", "ful", "less", "er")]


def write(path: Path, size_bytes: int) -> Path:
    """Rows of 4 KB."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=700)) for _ in range(200)]
    rows = texts if path.suffix == ".csv" else [json.dumps({"text": text}) for text in texts]
    written = 0
    with path.open("w") as file:
        file.write("text\n" if path.suffix == ".csv" else "")
        while written < size_bytes:
            written += file.write(draw.choice(rows) + "\n")
    return path


def rise(files: list[str], tokenizer: str, cache: str, block_bytes: int) -> int:
    """How far resident memory rises at most while the second file is prepared, after the first one."""
    readers.BLOCK_BYTES = block_bytes
    shards.BLOCK_ROWS = block_bytes // 1024  # 4 KB a row: bytes decide
    before = 0
    for file in files:
        section = DataSection.model_validate({"train": file, "sequence_length": 512})
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmRSS")
        prepare(section, "train", tokenizer, Path(cache))
    return status_bytes("VmHWM") - before


@pytest.fixture
def risen(tmp_path: Path, tokenizer_dir: Path) -> Any:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs (Linux)")

    def measure(first: Path, second: Path, block_bytes: int) -> int:
        arguments = [str(first), str(second)], str(tokenizer_dir), str(tmp_path / "cache"), block_bytes
        (found,) = in_processes(rise, 0, tmp_path / "work", *arguments)
        return int(found)

    return measure


def test_a_file_many_blocks_long_needs_the_memory_of_one(risen: Any, tmp_path: Path) -> None:
    """After a file of three blocks, one of sixteen takes no more than a small part of itself."""
    small, large = write(tmp_path / "small.jsonl", 3 * MIB // 4), write(tmp_path / "large.jsonl", 4 * MIB)
    assert risen(small, large, MIB // 4) < 3 * MIB // 2


def test_the_measurement_sees_a_file_that_is_held(risen: Any, tmp_path: Path) -> None:
    """A CSV file cannot be entered in the middle, so it is read whole."""
    small, large = write(tmp_path / "small.csv", 3 * MIB // 4), write(tmp_path / "large.csv", 4 * MIB)
    assert risen(small, large, MIB // 4) > 3 * MIB


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sixty_megabytes_with_the_blocks_of_a_real_run(risen: Any, tmp_path: Path) -> None:
    small, large = write(tmp_path / "small.jsonl", 20 * MIB), write(tmp_path / "large.jsonl", 60 * MIB)
    assert risen(small, large, readers.BLOCK_BYTES) < 5 * readers.BLOCK_BYTES

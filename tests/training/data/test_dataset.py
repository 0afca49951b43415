from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymem.errors import DataError
from raymem.recipe.data import DataSection
from raymem.training.data.encode import Encoder
from raymem.training.data.formats import Text
from raymem.training.data.packed import shards
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.pack import pack
from raymem.training.data.packed.shards import prepare
from tests.helpers.talks import encoded


@pytest.fixture
def prepared(
    write_jsonl: Callable[..., Path], texts: Callable[..., list[str]], tokenizer_dir: Path, tmp_path: Path
) -> Callable[..., list[tuple[Path, float]]]:
    def make(counts: list[int], **options: Any) -> list[tuple[Path, float]]:
        train = []
        for seed, count in enumerate(counts):
            path = write_jsonl(f"{seed}.jsonl", [{"text": text} for text in texts(count, seed)])
            train.append({"path": str(path), "weight": 1.0 + seed})
        section = DataSection.model_validate({"train": train, "sequence_length": 32} | options)
        return prepare(section, "train", str(tokenizer_dir), tmp_path).directories

    return make


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_rows_are_what_was_packed(
    prepared: Any, texts: Any, tokenizer: Any, packing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_ROWS", 8)
    rows = PackedRows(prepared([20, 9], packing=packing))
    encoder = Encoder(tokenizer, "tiny")
    want = [
        pack([encoded(encoder, Text(text)) for text in block], 32, packing, encoder.pad_id)
        for source in (texts(20, 0), texts(9, 1))
        for block in (source[at : at + 8] for at in range(0, len(source), 8))
    ]
    assert (rows.packing, rows.sequence_length) == (packing, 32)
    assert len(rows) == sum(len(packed.lengths) for packed in want)
    for name in ("input_ids", "targets", "starts"):
        found = np.stack([getattr(rows.row(i), name) for i in range(len(rows))])
        expected = np.concatenate([getattr(packed, name) for packed in want])
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert [rows.row(i).length for i in range(len(rows))] == rows.lengths.tolist()
    assert rows.num_targets.dtype == np.int32
    assert rows.num_targets.tolist() == [int(rows.row(i).targets.sum()) for i in range(len(rows))]
    assert [weight for _, weight in rows.sizes_and_weights] == [1.0, 2.0]
    assert sum(size for size, _ in rows.sizes_and_weights) == len(rows)


def test_rows_are_views_of_the_file(prepared: Any) -> None:
    row = PackedRows(prepared([5])).row(0)
    for array in (row.input_ids, row.targets, row.starts):
        assert not array.flags.writeable and not array.flags.owndata


def test_sources_must_have_one_shape(prepared: Any) -> None:
    mixed = prepared([5]) + prepared([5], packing="none")
    with pytest.raises(DataError, match=r"one sequence_length and packing, but .* has 32, bfd; .* has 32, none"):
        PackedRows(mixed)


def test_an_unfinished_directory_is_refused(prepared: Any, tmp_path: Path) -> None:
    ((directory, _),) = prepared([5])
    (directory / "manifest.json").unlink()
    with pytest.raises(DataError, match="is no finished data directory: run the preparation"):
        PackedRows([(directory, 1.0)])

"""How much an epoch takes of each source under a temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymem.errors import DataError
from raymem.recipe.data import DataSection, Mix
from raymem.training.data.mix import weights_in_rows
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.sampler import Sampler
from raymem.training.data.packed.shards import prepare
from raymem.training.data.packed.shared import to_dict

SIZES = [(900, 90_000, 1.0), (100, 2_000, 1.0)]


def amounts(mix: Mix | None, sizes: Any = SIZES) -> list[float]:
    """Rows that each source gives."""
    return [weight * rows for weight, (rows, _, _) in zip(weights_in_rows(mix, sizes), sizes, strict=True)]


def test_weights_alone_and_temperature_one() -> None:
    weighted = [(900, 90_000, 2.0), (100, 2_000, 0.5)]
    assert weights_in_rows(None, weighted) == [2.0, 0.5]
    for by in ("rows", "tokens"):
        assert weights_in_rows(Mix(by=by, temperature=1.0), weighted) == pytest.approx([2.0, 0.5])


def test_the_share_is_the_tempered_size_of_the_same_total() -> None:
    assert amounts(Mix(temperature=2.0)) == pytest.approx([1000 * 30 / 40, 1000 * 10 / 40])
    weighted = [(900, 90_000, 1.0), (100, 2_000, 3.0)]
    assert amounts(Mix(temperature=2.0), weighted) == pytest.approx([600.0, 600.0])


def test_by_tokens_the_tokens_are_shared() -> None:
    rows = amounts(Mix(by="tokens", temperature=2.0))
    tokens = [rows[0] * 100, rows[1] * 20]
    assert sum(tokens) == pytest.approx(92_000)
    assert tokens[0] / tokens[1] == pytest.approx(math.sqrt(90_000 / 2_000))


def test_a_very_large_temperature_makes_weights_the_shares_and_a_small_one_takes_the_largest() -> None:
    assert amounts(Mix(temperature=1e9), [(900, 1, 1.0), (100, 1, 3.0)]) == pytest.approx([300.0, 900.0], rel=1e-6)
    assert amounts(Mix(temperature=0.5)) == pytest.approx([1000 * 0.81 / 0.82, 1000 * 0.01 / 0.82])


def test_what_takes_nothing_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"^data\.train\[1\]\.weight=0\.001 takes none of its 100 rows .* at least 0\.01"
    ):
        weights_in_rows(None, [(900, 1, 1.0), (100, 1, 0.001)])
    with pytest.raises(
        DataError, match=r"^data\.train\[1\]\.weight=1 with data\.mix\.temperature=0\.01 takes none of its 100 rows"
    ):
        weights_in_rows(Mix(temperature=0.01), SIZES)


@pytest.fixture
def two(write_jsonl: Callable[..., Path], texts: Callable[..., list[str]]) -> list[str]:
    return [
        str(write_jsonl("large.jsonl", [{"text": text} for text in texts(300)])),
        str(write_jsonl("small.jsonl", [{"text": text} for text in texts(20, seed=1)])),
    ]


def test_an_epoch_holds_these_rows_in_an_order_of_its_own(two: list[str], tokenizer_dir: Path, tmp_path: Path) -> None:
    def section(**options: Any) -> DataSection:
        return DataSection.model_validate({"train": two, "sequence_length": 32, "packing": "none"} | options)

    plain = prepare(section(), "train", str(tokenizer_dir), tmp_path)
    mixed = prepare(section(mix={"temperature": 2}), "train", str(tokenizer_dir), tmp_path)
    assert [source.directory for source in mixed.sources] == [source.directory for source in plain.sources]
    # Workers get the shares as numbers, and a run that resumes compares them.
    assert to_dict(mixed) != to_dict(plain) and mixed.key != plain.key
    rows = PackedRows(mixed.directories)
    sampler = Sampler(0, rows.sizes_and_weights, 8)
    (large, _), (small, _) = rows.sizes_and_weights
    per_epoch = sampler.epoch_size
    assert per_epoch == pytest.approx(large + small, abs=1)
    ids = np.concatenate([sampler.ids(step) for step in range(2 * per_epoch // 8 + 2)])
    shares = []
    for epoch in range(2):
        seen = ids[epoch * per_epoch : (epoch + 1) * per_epoch]
        counts = np.bincount(seen, minlength=large + small)
        assert counts[:large].max() == 1  # no row twice where only some are taken
        assert counts[large:].max() - counts[large:].min() <= 1
        shares.append(counts[:large].sum() / counts[large:].sum())
    assert shares[0] == shares[1] == pytest.approx(math.sqrt(large / small), rel=0.02)
    assert ids[:per_epoch].tolist() != ids[per_epoch : 2 * per_epoch].tolist()


def test_evaluation_counts_every_row_once_whatever_the_mix(two: list[str], tokenizer_dir: Path, tmp_path: Path) -> None:
    section = DataSection.model_validate({"train": two, "eval": two, "mix": {"temperature": 3}, "sequence_length": 32})
    prepared = prepare(section, "eval", str(tokenizer_dir), tmp_path)
    assert [source.weight for source in prepared.sources] == [1.0, 1.0]

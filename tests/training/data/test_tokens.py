"""Rows that are token ids already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import DataError
from raymem.kinds import IGNORED
from raymem.recipe.data import DataSection, Source
from raymem.training.data.batches import rank_batches
from raymem.training.data.formats import resolve_format, to_example
from raymem.training.data.packed import shards
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shards import Prepared, prepare
from raymem.training.data.tokens import Tokens, tokens

PLACE = "x.jsonl:17"


def plain(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    read = tokens(row, PLACE)
    return read.input_ids.tolist(), read.targets.tolist()


def test_labels_say_what_is_a_target() -> None:
    assert plain({"input_ids": [5, 6, 7]}) == ([5, 6, 7], [True] * 3)
    assert plain({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}) == ([5, 6, 7], [False, False, True])
    assert plain({"input_ids": [5, 6], "labels": None, "attention_mask": None}) == ([5, 6], [True] * 2)
    assert plain({"input_ids": []}) == ([], [])


@pytest.mark.parametrize("mask", [[0, 1, 1, 0], [False, True, True, False]])
def test_padding_is_left_out_with_its_labels(mask: list[Any]) -> None:
    row = {"input_ids": [0, 5, 6, 0], "labels": [0, -100, 6, 0], "attention_mask": mask}
    assert plain(row) == ([5, 6], [False, True])
    assert plain({"input_ids": [0, 0], "attention_mask": [0, 0]}) == ([], [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": [1]}, r"column 'input_ids' is NoneType None, not a list of integers"),
        ({"input_ids": "5 6"}, r"column 'input_ids' is str '5 6', not a list"),
        ({"input_ids": [5, 6.0]}, r"input_ids\[1\] is float 6\.0, not a token id: write whole numbers"),
        ({"input_ids": [5, "6"]}, r"input_ids\[1\] is str '6'"),
        ({"input_ids": [True]}, r"input_ids\[0\] is bool True"),
        ({"input_ids": [5, None]}, r"input_ids\[1\] is NoneType"),
        ({"input_ids": [2**40]}, r"input_ids\[0\] is int 1099511627776"),
        ({"input_ids": [[5]]}, r"input_ids\[0\] is list"),
        ({"input_ids": [5, 6], "labels": [6]}, r"has 1 labels for 2 input_ids: write one for each, or leave"),
        ({"input_ids": [5, 6], "labels": 6}, r"column 'labels' is int"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, r"has 1 attention_mask for 2 input_ids"),
        ({"input_ids": [5, 6], "attention_mask": [1, 2]}, r"attention_mask has values besides 0 \(padding\) and 1"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, r"attention_mask has a 0 between ones"),
        # Shifted by whoever wrote them.
        (
            {"input_ids": [5, 6, 7], "labels": [6, 7, -100]},
            r"label 6 at position 0, where input_ids has 5: .* not shif",
        ),
    ],
)
def test_errors_name_place_value_and_cure(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^x\.jsonl:17 .*{message}" if "label " not in message else message):
        tokens(row, PLACE)


def test_the_format_and_its_columns() -> None:
    assert resolve_format(Source(path="x"), {"input_ids": [1], "labels": [1]}, "data.train[0]") == "tokens"
    assert resolve_format(Source(path="x"), {"text": "a", "input_ids": [1]}, "data.train[0]") == "text"
    source = Source(path="x", columns={"input_ids": "ids"})
    row = {"ids": [1, 2]}
    assert resolve_format(source, row, "data.train[0]") == "tokens"
    assert isinstance(to_example(row, "tokens", source.columns, PLACE), Tokens)


def test_an_id_outside_the_vocabulary_is_named(
    write_jsonl: Callable[..., Path], tokenizer_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    last = max(tokenizer.get_vocab().values())
    for token in (last + 1, -1):
        path = write_jsonl("x.jsonl", [{"input_ids": [0, last]}] * 3 + [{"input_ids": [0, token]}])
        section = DataSection(train=str(path), sequence_length=32)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=rf"x\.jsonl:4 input_ids has {token}, but the ids .* are 0 to {last}: set"):
            prepare(section, "train", str(tokenizer_dir), tmp_path)


def prepared(path: Path, tokenizer_dir: Path, cache: Path, **options: Any) -> Prepared:
    section = DataSection.model_validate({"train": {"path": str(path)}, "sequence_length": 16} | options)
    return prepare(section, "train", str(tokenizer_dir), cache)


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_batches_are_those_that_transformers_would_make(
    packing: str, write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Each row's labels are its own, but for the first, which nothing predicts."""
    rows = [
        {"input_ids": [10 + n, 20, 30, 40 + n, 50], "labels": [-100, -100, 30, 40 + n, 50], "attention_mask": [1] * 5}
        for n in range(5)
    ]
    padded = {"input_ids": [7, 9, 9], "labels": [7, -100, -100], "attention_mask": [1, 0, 0]}
    path = write_jsonl("x.jsonl", [*rows, padded])
    result = prepared(path, tokenizer_dir, tmp_path, packing=packing)
    (source,) = result.sources
    assert (source.num_examples, source.dropped, source.num_targets, source.num_tokens) == (6, 1, 15, 25)
    packed = PackedRows(result.directories)
    (batch,) = rank_batches(packed, torch.arange(len(packed)).numpy(), 0, 1, len(packed))
    lengths = [len(row["input_ids"]) for row in rows]
    starts = {"bfd": [(0, 0), (0, 5), (0, 10), (1, 0), (1, 5)], "none": [(n, 0) for n in range(5)]}[packing]
    seen = sorted(
        (batch.input_ids[b, at : at + n].tolist(), batch.labels[b, at : at + n].tolist())
        for (b, at), n in zip(starts, lengths, strict=True)
    )
    assert seen == sorted((row["input_ids"], row["labels"]) for row in rows)
    assert int((batch.labels != IGNORED).sum()) == 15


def test_what_is_all_targets_goes_on_in_another_row_and_the_rest_is_cut(
    write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    ids = list(range(40))
    whole = prepared(write_jsonl("a.jsonl", [{"input_ids": ids, "labels": ids}]), tokenizer_dir, tmp_path).sources[0]
    masked = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    cut = prepared(write_jsonl("b.jsonl", [masked]), tokenizer_dir, tmp_path).sources[0]
    assert (whole.num_tokens, whole.truncated) == (40, 0)
    assert (cut.num_tokens, cut.truncated) == (16, 1)


def test_parquet_and_json_lines_give_the_same_bytes(
    write_jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(shards, "BLOCK_ROWS", 4)
    rows = [
        {
            "input_ids": list(range(n, n + 6)),
            "labels": [-100] * 3 + list(range(n + 3, n + 6)),
            "attention_mask": [1] * 6,
        }
        for n in range(9)
    ]
    types = {"input_ids": pa.uint16(), "labels": pa.int64(), "attention_mask": pa.int8()}
    columns = {name: pa.array([row[name] for row in rows], pa.list_(kind)) for name, kind in types.items()}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    lines = write_jsonl("x.jsonl", rows)
    one, other = (
        prepared(path, tokenizer_dir, tmp_path / path.suffix).sources[0].directory
        for path in (tmp_path / "x.parquet", lines)
    )
    assert [p.read_bytes() for p in sorted(one.glob("*.arrow"))] == [
        p.read_bytes() for p in sorted(other.glob("*.arrow"))
    ]
    assert len(list(one.glob("*.arrow"))) == 3


def test_rows_equal_those_that_the_tokenizer_makes_of_the_text(
    write_jsonl: Callable[..., Path],
    texts: Callable[..., list[str]],
    tokenizer: Any,
    tokenizer_dir: Path,
    tmp_path: Path,
) -> None:
    """Texts, and the ids that raymem gives them, are the same training data."""
    sentences = texts(30)
    end = tokenizer.eos_token_id
    ids = [[*tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, end] for text in sentences]
    as_text = prepared(write_jsonl("text.jsonl", [{"text": text} for text in sentences]), tokenizer_dir, tmp_path)
    as_ids = prepared(write_jsonl("ids.jsonl", [{"input_ids": each} for each in ids]), tokenizer_dir, tmp_path)
    one, other = (result.sources[0].directory for result in (as_text, as_ids))
    assert one != other
    assert (one / "shard-000000.arrow").read_bytes() == (other / "shard-000000.arrow").read_bytes()

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from raymem.errors import DataError
from raymem.recipe.data import Source
from raymem.training.data import demo
from raymem.training.data.readers import read_block
from raymem.training.data.sources import OpenedSource, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(opened, "cache", directory, raising=False)
    return directory


def opened(path: Path | str, **options: Any) -> OpenedSource:
    return open_source(Source(path=str(path), **options), "data.train[1]", opened.cache, 2)  # type: ignore[attr-defined]


def rows_of(source: OpenedSource) -> list[Any]:
    return [row for block in source.blocks for _, row in read_block(block)]


def test_a_directory_is_its_data_files_in_order(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    write_jsonl("d/b.jsonl", [{"n": 3}])
    write_jsonl("d/a.jsonl", [{"n": 0}, {"n": 1}, {"n": 2}])
    write_jsonl("d/c.json", [])
    (tmp_path / "d" / "README.md").write_text("not data")
    (tmp_path / "d" / ".a.jsonl").write_text("an editor's leftovers")
    source = opened(tmp_path / "d")
    assert rows_of(source) == [{"n": n} for n in range(4)]
    assert (source.first_row, len(source.blocks)) == ({"n": 0}, 3)
    assert source.first_place.endswith("d/a.jsonl:1")


def test_files_of_the_same_contents_in_one_source_are_pointed_out(
    tmp_path: Path, write_jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    plain = write_jsonl("d/a.jsonl", [{"n": 1}])
    (tmp_path / "d" / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert len(rows_of(opened(tmp_path / "d"))) == 2
    assert f"data.train[1]: {plain} and {plain}.gz have the same contents, and both are read" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
@pytest.mark.parametrize("max_rows", [1, 2, 3, 5, 6, 99])
def test_the_first_rows_of_a_source(tmp_path: Path, kind: str, max_rows: int) -> None:
    """Blocks are of two rows here, so that the cut falls on their edges and within them, and in the second file."""
    table = pa.table({"text": [f"row {n}" for n in range(3)]})
    for name in ("a", "b"):
        path = tmp_path / "d" / f"{name}.{kind}"
        path.parent.mkdir(exist_ok=True)
        match kind:
            case "csv":
                csv.write_csv(table, path)
            case "parquet":
                parquet.write_table(table, path)
            case "json":
                path.write_text(json.dumps(table.to_pylist()))
            case "jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
            case "txt":
                path.write_text("\n\n".join(row["text"] for row in table.to_pylist()))
    every = rows_of(opened(tmp_path / "d"))
    assert len(every) == (2 if kind == "txt" else 6)
    assert rows_of(opened(tmp_path / "d", max_rows=max_rows)) == every[:max_rows]


def test_identity_is_the_content_not_the_path(write_jsonl: Callable[..., Path]) -> None:
    one, same = write_jsonl("one.jsonl", [{"n": 1}]), write_jsonl("elsewhere/two.jsonl", [{"n": 1}])
    other = write_jsonl("other.jsonl", [{"n": 2}])
    assert opened(one).identity == opened(same).identity != opened(other).identity


def test_relative_and_home_paths(
    tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl("x.jsonl", [{"n": 1}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows_of(opened("x.jsonl")) == rows_of(opened("~/x.jsonl")) == rows_of(opened(".")) == [{"n": 1}]
    # The block goes to processes that run elsewhere.
    assert Path(opened("x.jsonl").blocks[0].path).is_absolute()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train.jsnl", r"data\.train\[1\]\.path='.*/train\.jsnl' does not exist: did you mean .*/train\.jsonl\?"),
        ("zzz", r"'.*zzz' does not exist: .* has nothing of a similar name"),
        ("gone/x.csv", r"gone/x\.csv' does not exist, nor does its directory .*gone"),
        ("notes.md", r"notes\.md' is no known kind of file: use one of \.jsonl, \.json, \.csv, \.parquet, \.txt"),
        ("void", r"void' has no data files: put .* files directly into it"),
        ("empty.jsonl", r"empty\.jsonl' has no rows: give it at least one example"),
        ("empty.csv", r"empty\.csv' has no rows"),
    ],
)
def test_errors_name_place_value_and_cure(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "notes.md").write_text("")
    (tmp_path / "void").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / path)


def test_urls_and_unknown_demo_data_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train\[1\]\.path='http://b/x\.jsonl': data are not read from http://"):
        opened("http://b/x.jsonl")
    with pytest.raises(DataError, match=r"'demo:poems' is no demo data: use demo:functions or demo:text"):
        opened("demo:poems")
    with pytest.raises(DataError, match=r"data\.train\[1\]\.split='test' .*: use train or eval"):
        opened("demo:text", split="test")


@pytest.mark.parametrize("option", ["subset", "revision"])
def test_options_of_the_hub_mean_nothing_for_files(write_jsonl: Callable[..., Path], option: str) -> None:
    with pytest.raises(DataError, match=rf"data\.train\[1\]\.{option}='x' means something for a Hugging Face id only"):
        opened(write_jsonl("a.jsonl", [{"n": 1}]), **{option: "x"})


def test_demo_splits_are_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = demo.DemoPaths(tmp_path)
    paths.corpus("functions", "eval").write_text('{"prompt": "p", "completion": "c"}\n')
    monkeypatch.setattr(demo, "ensure_demo", lambda cache_dir: paths)
    source = opened("demo:functions", split="eval")
    assert source.first_row == {"prompt": "p", "completion": "c"}


def test_a_hub_id_is_identified_by_what_it_resolved_to(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    first = opened("org/name", split="train", revision="v1")
    assert rows_of(first) == rows and len(first.blocks) == 2
    rows.append({"text": "four"})
    assert opened("org/name", split="train", revision="v1").identity != first.identity

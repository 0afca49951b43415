from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import DataError
from raymem.training.data.readers import Block, index_file, index_hub, read_block
from raymem.training.data.rows import plain_text
from raymem.training.data.sources.splits import data_files

ROWS = [{"text": f"row {i}", "n": str(i)} for i in range(10)]


def save(path: Path, rows: list[dict[str, str]]) -> None:
    if path.name == "list.json":
        path.write_text("\n " + json.dumps(rows, indent=1))
    elif path.suffix in (".json", ".jsonl"):
        path.write_text("\n".join(json.dumps(row) + ("\n  " if i % 3 == 0 else "") for i, row in enumerate(rows)))
    elif path.suffix == ".csv":
        path.write_text("text,n\n" + "".join(f"{row['text']},{row['n']}\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)


def read_all(path: Path, block_rows: int = 3) -> list[tuple[str, dict[str, Any]]]:
    return [item for block in index_file(path, block_rows)[1] for item in read_block(block)]


@pytest.mark.parametrize("name", ["x.jsonl", "lines.json", "list.json", "x.csv", "x.parquet"])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_blocks_hold_every_row_once_in_order(tmp_path: Path, name: str, count: int) -> None:
    save(tmp_path / name, ROWS[:count])
    _, blocks = index_file(tmp_path / name, 3)
    assert [block.num_rows for block in blocks] == [3] * (count // 3) + [1] * (count % 3)
    assert [row for _, row in read_all(tmp_path / name)] == ROWS[:count]


def test_a_row_s_place_is_its_line(tmp_path: Path) -> None:
    save(tmp_path / "x.jsonl", ROWS)
    places = [place for place, _ in read_all(tmp_path / "x.jsonl")]
    assert [int(place.rsplit(":", 1)[1]) for place in places] == [1, 3, 4, 5, 7, 8, 9, 11, 12, 13]


def test_the_last_row_needs_no_newline_and_the_first_may_have_a_mark(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}')
    assert [row for _, row in read_all(tmp_path / "x.jsonl")] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("block_rows", [1, 2, 100])
def test_a_text_is_cut_between_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    monkeypatch.setattr(plain_text, "PIECE_BYTES", 20)
    monkeypatch.setattr(plain_text, "LONGEST_BYTES", 60)
    paragraphs = ["one", "two\nthree\nfour", "f\u00efve six seven eight", "x" * 100, "a\n" * 50, "end"]
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(paragraphs).replace("two", "two\r").encode())
    read = read_all(path, block_rows)
    assert [row["text"] for _, row in read[:3]] == ["one\n\ntwo\nthree\nfour\n", paragraphs[2] + "\n", "x" * 100 + "\n"]
    assert [int(place.rsplit(":", 1)[1]) for place, _ in read[:3]] == [1, 7, 9]
    assert "".join(row["text"] for _, row in read[3:]).split() == ["a"] * 50 + ["end"]
    assert max(len(row["text"]) for _, row in read[3:]) == 60
    path.write_bytes(b"one\n\xff\n")
    with pytest.raises(DataError, match=r"book\.txt: the text from line 1 on is not UTF-8 \(invalid start byte\)"):
        read_all(path)
    path.write_bytes(b"\n \n")
    assert index_file(path, block_rows)[1] == []


def test_a_text_beside_data_is_no_data(tmp_path: Path) -> None:
    for name in ("a.jsonl", "LICENSE.txt", "b.txt.gz"):
        (tmp_path / name).touch()

    def entries(folder: str) -> list[tuple[str, bool]]:
        return [(path.name, False) for path in tmp_path.iterdir()]

    assert data_files(entries) == ["a.jsonl"]
    (tmp_path / "a.jsonl").unlink()
    assert data_files(entries) == ["LICENSE.txt", "b.txt.gz"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "x.jsonl:17 is not valid JSON .*: write one UTF-8 JSON object per line"),
        (b'{"text": "\xff"}', "x.jsonl:17 is not valid JSON .*utf-8.*: write one UTF-8"),
        (b"[1, 2]", r"x.jsonl:17 is list \[1, 2\], not an object"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n' * 15 + b"\n" + line + b"\n")
    _, blocks = index_file(tmp_path / "x.jsonl", 4)
    list(read_block(blocks[0]))
    with pytest.raises(DataError, match=message):
        list(read_block(blocks[-1]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[{"a": 1},\n {"a": }]', "x.json:2 is not valid JSON .*: write one list of objects"),
        ("x.json", b'[{"a": "\xff"}]', "x.json:1 is not valid JSON .it is not UTF-8"),
        ("x.json", b'[{"a": 1}, 7]', "x.json row 2 is int 7, not an object"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", "x.csv is not a valid CSV file .*3: 1,2,3"),
        ("x.parquet", b"PAR1 and nothing else", "x.parquet is not a valid Parquet file"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path / name)


def test_damaged_parquet_pages_are_named(tmp_path: Path) -> None:
    save(tmp_path / "x.parquet", ROWS)
    content = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    with pytest.raises(DataError, match=r"x.parquet row group 0 is damaged"):
        read_all(tmp_path / "x.parquet")


def test_csv_values_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('text,label\n007,\n"two\nlines, ""quoted""",NA\n')
    rows = [row for _, row in read_all(tmp_path / "x.csv", 1)]
    assert rows == [{"text": "007", "label": ""}, {"text": 'two\nlines, "quoted"', "label": "NA"}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_an_empty_file_has_no_blocks(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    assert index_file(tmp_path / name, 3)[1] == []


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    for count in (1, 2):
        save(tmp_path / "list.json", ROWS[:count])
        assert len(read_all(tmp_path / "list.json")) == count


@pytest.mark.parametrize("name", ["x.jsonl", "list.json", "x.csv"])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / name, ROWS)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not keep root out
    with pytest.raises(DataError, match=rf"{name} cannot be read \(Permission denied\): check"):
        index_file(tmp_path / name, 3)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], list[Any]]:
    """Stands in for the network; returns the calls that ``load_dataset`` gets."""

    def serve(rows: list[Any]) -> list[Any]:
        import datasets

        calls: list[Any] = []

        def load_dataset(path: str, **options: Any) -> Any:
            calls.append((path, options))
            return datasets.Dataset.from_list(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def test_hub_rows_come_by_block(hub: Callable[[list[Any]], list[Any]]) -> None:
    calls = hub(ROWS)
    fingerprint, blocks = index_hub("org/name", "sub", "train[:10]", "v1", 4)
    assert calls == [("org/name", {"name": "sub", "split": "train[:10]", "revision": "v1"})]
    assert [row for block in blocks for _, row in read_block(block)] == ROWS
    assert next(place for place, _ in read_block(blocks[1])) == "org/name[train[:10]] row 5"
    assert fingerprint == blocks[0].fingerprint


def test_a_hub_data_set_that_changed_in_between_is_refused(hub: Callable[[list[Any]], list[Any]]) -> None:
    hub(ROWS)
    blocks: list[Block] = [*index_hub("org/moving", None, "train", None, 4)[1]]
    hub(ROWS[:5])
    with pytest.raises(DataError, match=r"org/moving differs between processes .* pin it with revision"):
        list(read_block(blocks[0]))


def test_a_failing_hub_says_what_to_pass_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\nlong traceback")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"org/name .*split train.*ConnectionError: Couldn't reach .*pass a local"
    ) as info:
        index_hub("org/name", None, "train", None, 4)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}\n', r"a\.jsonl:2: the key 'c' is given twice; keep"),
        ("a.json", '[{"a": 1, "a": 2}]', r"a\.json:1: the key 'a' is given twice; keep"),
        ("a.csv", "text,id,text\nx,1,y\n", r"a\.csv:1: the column 'text' is given twice; rename"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        [list(read_block(block)) for block in index_file(tmp_path / name, 10)[1]]

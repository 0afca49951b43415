"""Data that nobody meant to give: each is one sentence with its place and a cure, soon, and in little memory."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import DataError
from raymem.recipe.data import Source
from raymem.training.data.readers import index_file, read_block
from raymem.training.data.rows.json_text import MAX_DEPTH
from raymem.training.data.sources import open_source

MIB = 1 << 20
DEEP = "[" * 200_000
DIGITS = "9" * 5000


def parquet(path: Path, column: Any, name: str = "text") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: column}), path)


def not_utf8() -> Any:
    import pyarrow as pa

    texts = pa.array([b"fine", b"caf\xe9"], pa.binary())
    return pa.StringArray.from_buffers(2, texts.buffers()[1], texts.buffers()[2])


def read(path: Path, max_bytes: int = MIB) -> list[tuple[str, Any]]:
    return [item for block in index_file(path, 3, "", max_bytes)[1] for item in read_block(block)]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "x.jsonl",
            '{"text": "a"}\n{"text": "cut \\ud83d"}',
            r":2: it holds '\\ud83d' after .*, which is half of a char",
        ),
        ("x.jsonl", '{"a\\uDE00": 1}', r":1: it holds '\\ude00' after .*: remove it"),
        ("x.json", '[{"text": "a"},\n{"text": "cut \\ud83d"}]', r":2: it holds '\\ud83d' after"),
        ("x.jsonl", '{"n": ' + DIGITS + "}", ":1: an integer has over 4300 digits: write it as a text"),
        ("x.json", '[\n{"n": ' + DIGITS + "}]", ":2: an integer has over 4300 digits: write it as a text"),
        ("x.jsonl", DEEP, f":1: it is nested more than {MAX_DEPTH} deep: write it flatter"),
        ("x.json", DEEP, f":1: it is nested more than {MAX_DEPTH} deep"),
        ("x.jsonl", '{"a": ' + "[" * 400 + "]" * 400 + "}", f":1: it is nested more than {MAX_DEPTH} deep"),
        ("x.json", '[{"a": 1}, ' + "[" * 400 + "]" * 400 + "]", f":1: it is nested more than {MAX_DEPTH} deep"),
        ("x.csv", "te\xe9t,b\na,b\n".encode("latin-1"), ":1: the names of the columns are not UTF-8 .* convert"),
        ("x.csv", "text,b\ncaf\xe9,b\n".encode("latin-1"), r"not a valid CSV file \(.*UTF8.*all in UTF-8"),
        ("x.csv", "text,b\na,b\n".encode("utf-16"), "is not UTF-8 .*as UTF-16.*: convert it"),
        ("x.csv", "text,b\na,b\n".encode("utf-16-le"), "is not UTF-8 .*as UTF-16"),
        ("x.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is not UTF-8 .*as UTF-16"),
        ("x.jsonl", '{"text": "a"}\n'.encode("utf-16-be"), "is not UTF-8 .*as UTF-16"),
        ("x.json", '[{"text": "a"}]\n'.encode("utf-16"), "is not UTF-8 .*as UTF-16"),
        ("x.parquet", not_utf8, r" row 2 column 'text' is not UTF-8 .*: write its texts as UTF-8"),
        ("x.jsonl", '{"a": 1}\n{"text": "' + "x" * MIB + '"}', r":2: the example has more than 1048576 bytes, .*split"),
        ("x.json", '[{"a": 1},\n{"text": "' + "x" * MIB + '"}]', ":2: the example has more than 1048576 bytes"),
        ("x.csv", "text\na\n" + "x" * (MIB + 1) + "\n", " row 2: the example has more than 1048576 bytes"),
        ("x.csv", "text\na\n" + "x" * 9 * MIB + "\n", r"a row is longer than a block .* data\.max_example_bytes"),
        ("x.parquet", lambda: ["a"] * 70 + ["x" * 2 * MIB], " row 71: the example has more than 1048576 bytes"),
        ("x.json", '[{"a": 1} {"b": 1}]', r":1 is not valid JSON \(Expecting ',', found '{'\): write one list"),
        ("x.json", '[{"a": 1}', r":1 is not valid JSON \(it ends within the list\)"),
        ("x.json", '[{"a": "b', r":1 is not valid JSON \(Unterminated string starting at\)"),
        ("x.json", '[{"a": 1}]\n[]', r":2 is not valid JSON \('\[' follows the end of the list\)"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_odd_contents_are_named(tmp_path: Path, name: str, content: Any, sentence: str) -> None:
    path = tmp_path / name
    if callable(content):
        parquet(path, content())
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"^{path}.*{sentence}") as caught:
        read(path)
    assert len(str(caught.value)) < 1000


def test_rows_up_to_the_limits_are_read(tmp_path: Path) -> None:
    row = {"text": "x" * (MIB - 20), "more": "\U0001f600"}
    line = json.dumps(row)
    assert "\\ud83d" in line
    for name, content in (("x.jsonl", f"{line}\n{line}"), ("x.json", f"\ufeff [{line},\n {line}\n]\n")):
        (tmp_path / name).write_text(content)
        assert [found for _, found in read(tmp_path / name, len(line))] == [row, row]
        with pytest.raises(DataError, match="has more than"):
            read(tmp_path / name, len(line) - 1)
    (tmp_path / "x.jsonl").write_text('{"a": ' + "[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1) + "}")
    assert len(read(tmp_path / "x.jsonl")) == 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_a_list_is_read_the_same_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    rows = [{"n": 12345, "t": '\u00e9\U0001f600\\"', "f": [1.5e-7, True, None, {}]}, {}, {"": []}, {"a": "\u20ac"}] * 3
    text = "\ufeff\n[" + ",\r\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)) + " ] \n"
    (tmp_path / "x.json").write_text(text)
    monkeypatch.setattr("raymem.training.data.rows.json_text._CHUNK_BYTES", chunk)
    assert [row for _, row in read(tmp_path / "x.json")] == rows


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: os.mkfifo(path), "is no regular file"),
        (lambda path: path.symlink_to("/proc/self/maps"), "has no rows"),
        (lambda path: path.symlink_to(path), "cannot be read .*symbolic links"),
    ],
    ids=["device", "pipe", "proc", "link to itself"],
)
@pytest.mark.parametrize("name", ["d/x.jsonl", "d/x.json", "d/x.csv", "d/x.parquet", "d/x.jsonl.gz"])
def test_files_that_may_never_end_are_not_read(
    tmp_path: Path, name: str, make: Callable[[Path], None], sentence: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    make(path)
    sentence = "is damaged" if sentence == "has no rows" and path.suffix == ".gz" else sentence
    for given in (path, path.parent):
        with pytest.raises(DataError, match=rf"{name.partition('/')[0]}.*({sentence})"):
            open_source(Source(path=str(given)), "data.train[0]", tmp_path / "cache", 8)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/tmp/" + "x" * 300 + ".jsonl", r"cannot be read \(File name too long\): check the path"),
        ("~nosuchuser/x.jsonl", "no such user, or one without a home: write the whole path"),
        ("/tmp/a\0b.jsonl", r"cannot be read \(embedded null byte\)"),
        ("/tmp/" + "y/" * 3000, r"cannot be read \(File name too long\)"),
    ],
    ids=["name", "user", "nul", "path"],
)
def test_odd_paths_are_named(tmp_path: Path, path: str, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.train\[0\]\.path=.*{sentence}") as caught:
        open_source(Source(path=path), "data.train[0]", tmp_path, 8)
    assert len(str(caught.value)) < 800


def test_links_that_lead_back_are_named(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    write_jsonl("d/train/a.jsonl", [{"text": "a"}])
    write_jsonl("e/b.jsonl", [{"text": "b"}])
    (tmp_path / "d" / "train" / "more").symlink_to(tmp_path / "e")
    source = Source(path=str(tmp_path / "d"))
    assert len(open_source(source, "data.train[0]", tmp_path / "cache", 8).files) == 2
    (tmp_path / "e" / "back").symlink_to(tmp_path / "d" / "train")
    with pytest.raises(
        DataError, match=rf"the link .*/more/back leads back to {tmp_path}/d/train, .*: remove the link"
    ):
        open_source(source, "data.train[0]", tmp_path / "cache", 8)


REFUSALS = """
import json, sys
from pathlib import Path
from raymem.errors import DataError
from raymem.recipe.data import Source
from raymem.training.data.sources import open_source

folder, *names = sys.argv[1:]
for name in names:
    try:
        open_source(Source(path=f"{folder}/{name}"), "data.train[0]", Path(folder) / "cache", 2048)
    except DataError as error:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
        print(json.dumps([str(error), int(line.split()[1]) * 1024]))
"""
"""Prints what opening each file says, and the most memory that the process has had by then."""


def test_an_endless_line_is_refused_before_memory_goes(tmp_path: Path) -> None:
    """200 MB in one row of each kind, and archives of 12 MB that unpack to 12 GB in one line."""
    size, member = 200_000_000, gzip.compress(b" " * 16 * MIB)
    for name, begin in (("a.jsonl", '{"text": "'), ("a.json", '[{"text": "'), ("a.csv", "text\n")):
        with (tmp_path / name).open("w") as file:
            file.write(begin)
            for _ in range(size // 1_000_000):
                file.write("x" * 1_000_000)
            file.write({"a.jsonl": '"}', "a.json": '"}]', "a.csv": "\n"}[name])
    for name in ("bomb.jsonl.gz", "bomb.json.gz", "bomb.csv.gz"):
        with (tmp_path / name).open("wb") as out:
            out.write(gzip.compress(b"[" if "json." in name else b"t"))
            for _ in range(760):
                out.write(member)
    names = ["a.jsonl", "a.json", "a.csv", "bomb.jsonl.gz", "bomb.json.gz", "bomb.csv.gz"]
    if shutil.which("zstd"):
        subprocess.run(["zstd", "-q", "-1", tmp_path / "a.jsonl"], check=True)
        names.append("a.jsonl.zst")
    command = [sys.executable, "-c", REFUSALS, str(tmp_path), *names]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    said = [json.loads(line) for line in printed.splitlines()]
    assert len(said) == len(names)
    for name, (sentence, peak) in zip(names, said, strict=True):
        assert name in sentence
        assert "data.max_example_bytes" in sentence
        assert peak < 1_000_000_000, name
    assert not list((tmp_path / "cache").rglob("data.*"))

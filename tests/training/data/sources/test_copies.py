"""Compressed files: read as the plain ones are, and not at all where they are damaged."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raymem.errors import DataError
from raymem.recipe.data import DataSection, Source
from raymem.training.data.packed import shards
from raymem.training.data.packed.shards import prepare
from raymem.training.data.readers import read_block
from raymem.training.data.sources import OpenedSource, open_source

ROWS = [{"text": f"one two {'three ' * (n % 5)}", "n": str(n)} for n in range(20)]
PLAIN = {
    "jsonl": "\n".join(json.dumps(row) + ("\n" if n % 4 == 0 else "") for n, row in enumerate(ROWS)).encode(),
    "json": json.dumps(ROWS).encode(),
    "csv": ("text,n\n" + "".join(f"{row['text']},{row['n']}\n" for row in ROWS)).encode(),
}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": lambda plain: pa.compress(plain, codec="zstd", asbytes=True),
}


def opened(path: Path, cache: Path) -> OpenedSource:
    return open_source(Source(path=str(path)), "data.train[0]", cache, 7)


def rows_of(source: OpenedSource) -> list[tuple[str, dict[str, Any]]]:
    return [item for block in source.blocks for item in read_block(block)]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", PLAIN)
def test_rows_places_and_identity_are_those_of_the_plain_file(tmp_path: Path, kind: str, packed: str) -> None:
    plain, compressed = tmp_path / f"x.{kind}", tmp_path / f"x.{kind}.{packed}"
    plain.write_bytes(PLAIN[kind])
    compressed.write_bytes(PACK[packed](PLAIN[kind]))
    one, other = opened(plain, tmp_path / "cache"), opened(compressed, tmp_path / "cache")
    assert one.identity == other.identity
    assert [row for _, row in rows_of(other)] == ROWS
    places = [place.replace(f".{packed}", "") for place, _ in rows_of(other)]
    assert places == [place for place, _ in rows_of(one)]
    assert rows_of(other)[0][0].startswith(str(compressed))


def test_several_members_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"n": 1}\n') + gzip.compress(b'{"n": 2}\n'))
    assert [row for _, row in rows_of(opened(tmp_path / "x.jsonl.gz", tmp_path))] == [{"n": 1}, {"n": 2}]


def test_the_prepared_bytes_are_those_of_the_plain_file(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_ROWS", 7)
    keys = set()
    for name, content in (("x.jsonl", PLAIN["jsonl"]), ("y.jsonl.gz", gzip.compress(PLAIN["jsonl"]))):
        (tmp_path / name).write_bytes(content)
        section = DataSection(train=str(tmp_path / name), sequence_length=32)  # type: ignore[arg-type]
        keys.add(prepare(section, "train", str(tokenizer_dir), tmp_path / "cache").key)
    assert len(keys) == 1


def test_a_malformed_line_has_its_number_and_the_compressed_file_s_name(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"n": 1}\n\n{"n": \n'))
    with pytest.raises(DataError, match=rf"^{tmp_path}/x\.jsonl\.gz:3 is not valid JSON"):
        rows_of(opened(tmp_path / "x.jsonl.gz", tmp_path / "cache"))


@pytest.mark.parametrize("packed", PACK)
def test_a_damaged_file_is_named_with_how_far_it_could_be_read(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"x.jsonl.{packed}"
    plain = b"".join(b'{"text": "%d"}\n' % (n * 7919 % 100003) for n in range(300_000))
    whole = PACK[packed](plain)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=rf"^{path} is damaged or cut off after line \d\d+ \(\d+ bytes .*copy or"
    ) as info:
        opened(path, tmp_path / "cache")
    assert "\n" not in str(info.value)
    assert not list((tmp_path / "cache" / "sources").iterdir())


@pytest.mark.parametrize("packed", PACK)
def test_what_is_not_compressed_at_all_is_named(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"x.jsonl.{packed}"
    path.write_bytes(PLAIN["jsonl"])
    with pytest.raises(DataError, match=rf"^{path} is damaged, or no (gzip|zstd) file \(.*: compress it again"):
        opened(path, tmp_path / "cache")


def test_it_is_unpacked_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(PLAIN["jsonl"]))
    opened(path, tmp_path / "cache")
    (copy,) = (tmp_path / "cache" / "sources").iterdir()
    first = copy.stat()
    path.rename(tmp_path / "y.jsonl.gz")
    opened(tmp_path / "y.jsonl.gz", tmp_path / "cache")
    assert [each.stat() for each in (tmp_path / "cache" / "sources").iterdir()] == [first]

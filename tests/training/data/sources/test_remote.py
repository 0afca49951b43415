"""Data on an object store (a moto server on loopback) and on the Hugging Face hub (a folder that stands for it)."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from raymem.errors import DataError, TransientStorageError
from raymem.recipe.data import DataSection, Source
from raymem.storage.storage import Storage
from raymem.training.data.packed.shards import prepare
from raymem.training.data.readers import read_block
from raymem.training.data.sources import OpenedSource, copies, open_source
from raymem.training.data.sources.remote import RemoteDirectory, below, shown
from tests.helpers.faulty_proxy import ends_when_noticed, proxy_before

ROWS = [{"text": f"one two {n}"} for n in range(9)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class Bucket:
    """A folder of the bucket, into which tests write."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def write(self, name: str, content: bytes) -> str:
        with self.storage.filesystem.open_output_stream(f"{self.storage.root}/{name}", compression=None) as stream:
            stream.write(content)
        return self.storage.join(name)

    def delete(self, name: str) -> None:
        self.storage.filesystem.delete_file(f"{self.storage.root}/{name}")


@pytest.fixture
def bucket(s3_uri: str, tmp_path: Path) -> Bucket:
    return Bucket(Storage.open(s3_uri).child("data", tmp_path.name))


def opened(path: str, cache: Path, **options: Any) -> OpenedSource:
    return open_source(Source(path=path, **options), "data.train[0]", cache, 4)


def rows_of(source: OpenedSource) -> list[tuple[str, dict[str, Any]]]:
    return [item for block in source.blocks for item in read_block(block)]


@pytest.mark.parametrize("name", ["x y.jsonl", "x.jsonl.gz"])
def test_rows_of_an_object_are_those_of_the_file(bucket: Bucket, tmp_path: Path, name: str) -> None:
    uri = bucket.write(name, gzip.compress(LINES) if name.endswith(".gz") else LINES)
    (tmp_path / "x.jsonl").write_bytes(LINES)
    source = opened(uri, tmp_path / "cache")
    assert [row for _, row in rows_of(source)] == ROWS
    assert source.identity == opened(str(tmp_path / "x.jsonl"), tmp_path / "cache").identity
    # Options of the URI, which say where the server is, are no part of a row's place.
    assert source.first_place == f"{shown(uri)}:1" and "?" not in source.first_place


def test_it_is_fetched_once_and_again_when_it_is_another(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    chunks = RemoteDirectory.chunks

    def counting(self: RemoteDirectory, chunk_bytes: int) -> Iterator[bytes]:
        fetched.append("")
        return chunks(self, chunk_bytes)

    monkeypatch.setattr(RemoteDirectory, "chunks", counting)
    uri = bucket.write("x.jsonl", LINES)
    first = opened(uri, tmp_path / "cache").identity
    assert opened(uri, tmp_path / "cache").identity == first
    assert len(fetched) == 1
    bucket.write("x.jsonl", LINES.replace(b"one", b"two"))
    assert opened(uri, tmp_path / "cache").identity != first
    assert len(fetched) == 2


def test_a_store_that_is_away_is_waited_for(
    bucket: Bucket, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a file, which is then read from its start, and while it is looked for."""
    monkeypatch.setattr("raymem.storage.connect.TRIES", 1)
    with monkeypatch.context() as patch, proxy_before(s3_uri) as proxy:
        uri = proxy.uri(bucket.write("x.jsonl", LINES * 100))
        for number, how in enumerate(("reset", "refuse")):
            ends_when_noticed(proxy, patch)
            proxy.away(how)  # type: ignore[arg-type]
            source = opened(uri, tmp_path / str(number))
            assert [row for _, row in rows_of(source)] == ROWS * 100
        patch.undo()
        patch.setattr("raymem.training.data.sources.remote.RETRY_FOR_S", 0.1)
        proxy.away()
        with pytest.raises(TransientStorageError, match=r"^data\.train\[0\]\.path=.* cannot be read .*tried for"):
            opened(uri, tmp_path / "never")
    said = [record for record in caplog.records if record.name == "raymem.storage.retry"]
    assert len(said) == 5, "two outages began and ended, one did not end"


def test_splits_of_a_folder(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("d/data/train-00000-of-00002.jsonl", LINES)
    bucket.write("d/data/train-00001-of-00002.jsonl", LINES)
    bucket.write("d/data/test-00000-of-00001.jsonl", b'{"text": "three"}\n')
    bucket.write("d/README.md", b"no data")
    uri = bucket.storage.join("d")
    assert [row for _, row in rows_of(opened(uri, tmp_path, split="test"))] == [{"text": "three"}]
    assert [row for _, row in rows_of(opened(uri, tmp_path))] == ROWS * 2
    bucket.write("test/a.jsonl", LINES)
    path, _, options = bucket.storage.join("test").partition("?")
    for end in ("", "/"):  # the folder itself says the split
        assert [row for _, row in rows_of(opened(f"{path}{end}?{options}", tmp_path, split="test"))] == ROWS
    with pytest.raises(DataError, match=r"^data\.train\[0\] holds files of the splits test, train, not 'dev'"):
        opened(uri, tmp_path, split="dev")


def test_the_prepared_data_are_those_of_the_file(bucket: Bucket, tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(LINES)
    sections = [
        DataSection.model_validate({"train": path, "sequence_length": 32})
        for path in (str(tmp_path / "x.jsonl"), bucket.write("x.jsonl", LINES))
    ]
    one, other = (prepare(section, "train", str(tokenizer_dir), tmp_path / "cache") for section in sections)
    assert one == other


def test_what_is_trained_on_elsewhere_is_pointed_out(
    bucket: Bucket, tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.jsonl").write_bytes(LINES)
    large = bucket.write("large.jsonl", LINES * 2)
    train = [large, bucket.write("copy.jsonl", LINES)]
    evaluation = str(tmp_path / "x.jsonl")
    section = DataSection.model_validate({"train": train, "eval": evaluation, "sequence_length": 32})
    prepare(section, "eval", str(tokenizer_dir), tmp_path / "cache")
    assert "data.eval[0] is also trained on" in caplog.text and "a file of data.train[1]" in caplog.text
    # Another size is another file, which is not fetched to know that.
    assert len(list((tmp_path / "cache" / "sources").iterdir())) == 1


def test_a_malformed_line_is_named(bucket: Bucket, tmp_path: Path) -> None:
    uri = bucket.write("x.jsonl", LINES + b"{\n")
    with pytest.raises(DataError, match=rf"^{shown(uri)}:10 is not valid JSON"):
        rows_of(opened(uri, tmp_path))


def test_what_is_gone_or_was_never_there_is_one_sentence(bucket: Bucket, tmp_path: Path) -> None:
    uri = bucket.write("x.jsonl", LINES)
    file = RemoteDirectory(uri, "data.train[0]").file()
    bucket.delete("x.jsonl")
    place = rf"^data\.train\[0\]\.path='{shown(uri)}' "
    with pytest.raises(DataError, match=rf"{place}cannot be read \(.*does not exist.*\): check the path") as info:
        copies.plain_copy(file, "data.train[0]", tmp_path / "cache")
    assert "\n" not in str(info.value) and not list((tmp_path / "cache" / "sources").iterdir())
    with pytest.raises(DataError, match=r"does not exist: check the path"):
        opened(uri, tmp_path / "cache")
    bucket.write("d/notes.md", b"")
    with pytest.raises(DataError, match=r"has no data files: put \.jsonl"):
        opened(bucket.storage.join("d"), tmp_path / "cache")


def test_what_changes_while_it_is_fetched_is_refused(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = bucket.write("x.jsonl", LINES)
    chunks = RemoteDirectory.chunks

    def overwritten(self: RemoteDirectory, chunk_bytes: int) -> Iterator[bytes]:
        yield from chunks(self, chunk_bytes)
        bucket.write("x.jsonl", LINES.replace(b"one", b"two"))

    monkeypatch.setattr(RemoteDirectory, "chunks", overwritten)
    with pytest.raises(DataError, match=r"x\.jsonl changed while it was fetched: run again"):
        opened(uri, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "sources").iterdir())


def test_denied_access_is_one_sentence(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto import settings

    uri = bucket.write("x.jsonl", LINES)
    monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)  # now the server looks at credentials
    with pytest.raises(DataError, match=r"x\.jsonl' cannot be read .*: check that the credentials in") as info:
        opened(uri, tmp_path / "cache")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://host/x.jsonl", r"data are not read from http://: use s3://, gs://, hf://datasets"),
        ("s3://key:secret@bucket/x.jsonl", r"a password before the @ would write credentials into logs"),
        (
            "s3://bucket/x.jsonl?access_token=secret",
            r"'access_token' among its options would write credentials into logs",
        ),
        ("hf://org/name", r"write hf://datasets/<owner>/<name>"),
    ],
)
def test_uris_that_are_not_read(uri: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.train\[0\]\.path.*{message}") as info:
        RemoteDirectory(uri, "data.train[0]")
    assert "secret" not in str(info.value)


def test_names_below_a_uri_are_escaped_and_options_stay() -> None:
    assert below("s3://b/d/?scheme=http", "x y/z#1.jsonl") == "s3://b/d/x%20y/z%231.jsonl?scheme=http"
    assert shown("s3://b/x%20y?region=r") == "s3://b/x%20y"
    assert below("hf://datasets/o/n", "data/x.csv") == "hf://datasets/o/n/data/x.csv"


class FolderAsHub:
    """As much of ``HfFileSystem`` as is used, over a folder; the id of a blob is its contents."""

    root: Path

    def __init__(self, **_: Any) -> None:
        pass

    def _at(self, path: str) -> Path:
        if not (found := self.root / path.removeprefix("datasets/")).exists():
            raise FileNotFoundError(f"{path} (repository not found)\nlong explanation")
        return found

    def info(self, path: str) -> dict[str, Any]:
        at = self._at(path)
        if at.is_dir():
            return {"name": path, "type": "directory", "size": 0}
        return {"name": path, "type": "file", "size": at.stat().st_size, "blob_id": at.read_bytes().hex()}

    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]:
        assert detail
        return [self.info(f"{path}/{each.name}") for each in self._at(path).iterdir()]

    def open(self, path: str, block_size: int) -> Any:
        assert block_size == 0
        return self._at(path).open("rb")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], None]:
    real = huggingface_hub.HfFileSystem
    assert all(callable(getattr(real, name)) for name in ("info", "ls", "open"))
    monkeypatch.setattr(FolderAsHub, "root", tmp_path / "hub", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FolderAsHub)

    def write(name: str, content: bytes) -> None:
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / name).write_bytes(content)

    return write


def test_files_of_the_hub(hub: Callable[[str, bytes], None], tmp_path: Path) -> None:
    hub("org/name/data/train-00000-of-00001.jsonl", LINES)
    hub("org/name/data/test-00000-of-00001.jsonl.gz", gzip.compress(b'{"text": "three"}\n'))
    source = opened("hf://datasets/org/name", tmp_path / "cache")
    assert [row for _, row in rows_of(source)] == ROWS
    assert source.first_place == "hf://datasets/org/name/data/train-00000-of-00001.jsonl:1"
    test = opened("hf://datasets/org/name/data/test-00000-of-00001.jsonl.gz", tmp_path / "cache")
    assert test.first_row == {"text": "three"}
    hub("org/name/data/train-00000-of-00001.jsonl", LINES[: len(LINES) // 9])
    assert len(rows_of(opened("hf://datasets/org/name", tmp_path / "cache"))) == 1
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(DataError, match=r"name' cannot be read \(.*not found\)\): check owner, name.*TOKEN") as info:
        opened("hf://datasets/org/name", tmp_path / "cache")
    assert "\n" not in str(info.value)


def test_the_hub_out_of_reach_is_one_sentence(tmp_path: Path) -> None:
    """The library itself, which tests keep from the network."""
    with pytest.raises(
        DataError, match=r"^data\.train\[0\]\.path='hf://datasets/org/name' cannot be read .*: check ow"
    ):
        opened("hf://datasets/org/name", tmp_path)

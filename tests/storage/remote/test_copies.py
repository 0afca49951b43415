"""Models of an object store in the cache of a node: named by their content, whole, fetched once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raymem.errors import StorageError
from raymem.storage.checksums import write_checksums
from raymem.storage.remote import copies
from raymem.storage.remote.copies import fetched
from raymem.storage.storage import Storage

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "notes.bin": b"of no use"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "node"))
    return tmp_path / "node"


@pytest.fixture
def remote(s3_uri: str, tmp_path: Path) -> Storage:
    storage = Storage.open(s3_uri).child(f"copies-{tmp_path.name}")
    for name, content in FILES.items():
        storage.write_bytes(name, content)
    return storage


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were fetched."""
    fetch, names = copies._fetch, []

    def noted(storage: Storage, name: str, target: Path) -> None:
        names.append(name)
        fetch(storage, name, target)

    monkeypatch.setattr(copies, "_fetch", noted)
    return names


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def test_what_matches_is_fetched_and_more_of_it_later(remote: Storage, asked: list[str]) -> None:
    directory = fetched(remote.path, ["*.json"])
    assert names(directory) == {"config.json"}
    assert fetched(remote.path, ["*.json", "*.safetensors"]) == directory
    assert asked == ["config.json", "model.safetensors"]
    assert (directory / "model.safetensors").read_bytes() == b"weights"


def test_another_model_under_the_address_is_another_directory(remote: Storage) -> None:
    before = fetched(remote.path, ["*"])
    time.sleep(1.1)  # stores know when a file was written to the second
    remote.write_bytes("model.safetensors", b"WEIGHTS")  # of the same size
    after = fetched(remote.path, ["*"])
    assert after != before and (after / "model.safetensors").read_bytes() == b"WEIGHTS"
    assert (before / "model.safetensors").read_bytes() == b"weights", "somebody may be reading it"


def test_checksums_say_what_the_content_is(remote: Storage, tmp_path: Path) -> None:
    """The same bytes that were written again are the same model."""
    plain = tmp_path / "model"
    plain.mkdir()
    for name, content in FILES.items():
        (plain / name).write_bytes(content)
    write_checksums(plain)
    remote.upload_dir(plain, "whole", last="config.json")
    before = fetched(remote.join("whole"), ["*"])
    remote.upload_dir(plain, "whole", last="config.json")
    assert fetched(remote.join("whole"), ["*"]) == before


def test_several_may_ask_at_once(remote: Storage, asked: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        (directory,) = set(pool.map(lambda number: fetched(remote.path, ["*"]), range(4)))
    assert names(directory) == {*FILES} and sorted(asked) == sorted(FILES)


def test_a_copy_that_fails_leaves_nothing(remote: Storage, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        Path(str(arguments[-1])).write_bytes(b"hal")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copies, "copy_file", full)
    with pytest.raises(StorageError, match="no space left"):
        fetched(remote.path, ["*"])
    assert not [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".lock-")]


def test_the_cache_stays_within_its_limit(remote: Storage, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has fetched stays, since it may be reading it; what another one left goes."""
    left = cache / "models" / "left"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(100))
    monkeypatch.setenv("RAYMEM_CACHE_LIMIT", "50")
    directory = fetched(remote.path, ["*.json"])
    assert not left.exists() and names(directory) == {"config.json"}
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(100))
    fetched(remote.path, ["*"])
    assert not left.exists() and names(directory) == {*FILES}, "more of an entry needs room, too"

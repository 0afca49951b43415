"""Model files that are read where they are: the same tensors as from a disk, and no more bytes than were asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import ModelError, StorageError, TransientStorageError
from raymem.storage.remote import files
from raymem.storage.remote.files import RemoteFile, directory_at
from raymem.storage.safetensors_io import fingerprint, read_header, read_tensor, save_tensors
from raymem.storage.storage import Storage
from tests.helpers.faulty_proxy import FaultyProxy, ends_when_noticed, proxy_before
from tests.helpers.hub import NAME, Hub

FILE = "model.safetensors"
TENSORS = {
    "a": torch.randn(64, 128),
    "b": torch.randn(300, 1000).bfloat16(),
    "c": torch.arange(7),
    "none": torch.empty(0, 3),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tensors(directory / FILE, TENSORS)
    return directory


@pytest.fixture(scope="module")
def remote(disk: Path, s3_uri: str) -> Storage:
    storage = Storage.open(s3_uri).child("test-files")
    storage.upload_file(disk / FILE, FILE)
    return storage


@pytest.fixture
def proxy(s3_uri: str) -> Iterator[FaultyProxy]:
    with proxy_before(s3_uri) as before:
        yield before


def test_a_path_is_a_path(tmp_path: Path) -> None:
    assert directory_at(str(tmp_path)) == tmp_path


def test_they_hold_what_the_files_of_a_disk_hold(disk: Path, remote: Storage) -> None:
    there = directory_at(remote.path)
    assert (there / FILE).is_file() and not (there / "other").is_file()
    assert (there / FILE).stat().st_size == (disk / FILE).stat().st_size
    assert fingerprint(there, FILE) == fingerprint(disk, FILE)
    metadata, entries = read_header(there, FILE)
    assert (metadata, entries) == read_header(disk, FILE)
    for key, entry in entries.items():
        assert torch.equal(read_tensor(there, entry), TENSORS[key])


def test_a_tensor_costs_its_own_bytes(remote: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    there = directory_at(remote.path)
    _, entries = read_header(there, FILE)
    asked: list[int] = []
    readinto = RemoteFile.readinto

    def counted(self: RemoteFile, buffer: Any) -> int:
        asked.append(memoryview(buffer).nbytes)
        return readinto(self, buffer)

    monkeypatch.setattr(RemoteFile, "readinto", counted)
    read_tensor(there, entries["a"])
    assert asked == [TENSORS["a"].nbytes]


def test_what_is_away_is_waited_for(
    remote: Storage, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("raymem.storage.connect.TRIES", 1)
    there = directory_at(proxy.uri(remote.path))
    _, entries = read_header(there, FILE)
    ends_when_noticed(proxy, monkeypatch)
    proxy.away("reset")
    assert torch.equal(read_tensor(there, entries["b"]), TENSORS["b"])
    assert any("is back after" in record.getMessage() for record in caplog.records)


def test_what_stays_away_is_no_damaged_model(
    remote: Storage, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a job is tried again after an outage, but not after an error of the model."""
    monkeypatch.setattr("raymem.storage.connect.TRIES", 1)
    uri = proxy.uri(remote.path)
    impatient = Storage.open(uri, 0.1)
    monkeypatch.setattr(files, "storage_at", lambda uri: impatient)
    there = directory_at(uri)
    _, entries = read_header(there, FILE)
    proxy.away()
    with pytest.raises(TransientStorageError, match="cannot read"):
        read_tensor(there, entries["a"])


@pytest.mark.parametrize("status", [403, 404])
def test_what_is_refused_or_missing_is_said_at_once(status: int, remote: Storage, proxy: FaultyProxy) -> None:
    there = directory_at(proxy.uri(remote.path))
    proxy.errors(status=status)
    with pytest.raises(StorageError, match=r"cannot read .*/test-files/model\.safetensors") as caught:
        read_header(there, FILE)
    assert not isinstance(caught.value, TransientStorageError)


def test_of_the_hub_the_named_file_is_downloaded(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, llama, monkeypatch)
    (commit,) = hub.commits
    hub.move()
    there = directory_at(f"hf://{NAME}@{commit}")
    assert there / FILE == hub.snapshot(commit) / FILE
    with pytest.raises(ModelError, match=f"other of '{NAME}' cannot be had .* on node {os.uname().nodename} .*bucket"):
        _ = there / "other"

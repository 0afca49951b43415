"""Prepared data of runs on object stores: fetched once per machine, compared when they are used, kept meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raymem import entries
from raymem.errors import StorageError
from raymem.storage.publish import publish, verify
from raymem.storage.storage import Storage
from raymem.training.data.packed.shared import cache_dir, fetch_entry

LONG_AGO = 1_000_000_000


def write(directory: Path) -> dict[str, str]:
    (directory / "shard").write_bytes(bytes(range(200)))
    return {}


def test_what_is_damaged_here_is_fetched_again(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))
    storage = Storage.open(s3_uri).child(tmp_path.name)
    publish(tmp_path / "made", write)
    storage.upload_dir(tmp_path / "made", "cache/data/key")
    here = cache_dir(storage) / "data" / "key"
    fetch_entry("data/none", storage)
    assert not here.exists()
    fetch_entry("data/key", storage)
    content = bytearray((here / "shard").read_bytes())
    storage.delete_dir("cache/data/key")
    fetch_entry("data/key", storage)  # is here
    storage.upload_dir(tmp_path / "made", "cache/data/key")
    content[7] ^= 1
    (here / "shard").write_bytes(content)
    assert "fetched again" not in caplog.text
    fetch_entry("data/key", storage)
    verify(here)
    assert f"{here}/shard has SHA-256" in caplog.text and "It is fetched again." in caplog.text
    os.utime(here, (LONG_AGO,) * 2)
    entries.make_room(tmp_path / "cache", 0)
    assert here.is_dir(), "this process uses it"


def test_a_cache_that_cannot_be_made_is_named(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"^RAYMEM_CACHE: cannot write .*/file/cache: not a directory.*RAYMEM_CACHE"):
        cache_dir(Storage.open(s3_uri))

"""One driver at a time works on a run, and the next one is told who that is; a run that starts over makes room."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from raymem.errors import StorageError
from raymem.runs.lock import only_one, set_aside
from raymem.storage.errors import user_name
from raymem.storage.leases.record import read_record
from raymem.storage.storage import Storage


def test_a_second_driver_is_told_who_holds_the_run(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    lock = tmp_path / ".locks" / "run"
    me = rf"{user_name(os.geteuid())} on {platform.node()}, process {os.getpid()}"
    with only_one(storage, "run"):
        with (
            pytest.raises(StorageError, match=rf"training this run \({me}, since .* UTC\); wait for it"),
            only_one(storage, "run"),
        ):
            pass
        with only_one(storage, "other"):
            pass
    with only_one(storage, "run"):  # given back
        record = read_record(lock.read_bytes())
        assert record is not None and str(record).startswith(me)
    assert lock.read_text() == ""


def test_a_lock_that_may_only_be_read_is_held_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.open(str(tmp_path))
    with only_one(storage, "run"):
        pass
    read = Path.open

    def no_writing(path: Path, mode: str = "r") -> object:
        if path.name == "run" and mode != "r":
            raise PermissionError(13, "Permission denied")
        return read(path, mode)

    monkeypatch.setattr(Path, "open", no_writing)
    with (
        only_one(storage, "run"),
        pytest.raises(StorageError, match="training this run; wait for it"),
        only_one(storage, "run"),
    ):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("raymem.runs.lock.fcntl.flock", flock)
    with (
        pytest.raises(StorageError, match=r"cannot lock .*\.locks/run: .*No locks available; mount it with locks"),
        only_one(Storage.open(str(tmp_path)), "run"),
    ):
        pass


def test_a_run_on_an_object_store_is_set_aside(s3_uri: str, tmp_path: Path) -> None:
    storage = Storage.open(s3_uri).child(tmp_path.name)
    with only_one(storage, "run"):
        for number in (1, 2):
            storage.write_bytes("run/checkpoints/step_00000001/a file", str(number).encode())
            storage.write_bytes("run/metrics.jsonl", b"")
            set_aside(storage, "run")
            assert not storage.exists("run")
            assert storage.read_bytes(f"run.old-{number}/checkpoints/step_00000001/a file") == str(number).encode()
        set_aside(storage, "run")
    assert storage.list_dirs() == [".locks", "run.old-1", "run.old-2"]

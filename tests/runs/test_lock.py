"""One driver at a time works on a run, and the next one is told who that is."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from raymem.errors import StorageError
from raymem.runs.lock import only_one
from raymem.storage.errors import user_name
from raymem.storage.storage import Storage


def test_a_second_driver_is_told_who_holds_the_run(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    me = rf"{user_name(os.geteuid())} on {platform.node()}, process {os.getpid()}"
    with only_one(storage, "run"):
        with pytest.raises(StorageError, match=rf"training this run \({me}\); wait for it"), only_one(storage, "run"):
            pass
        with only_one(storage, "other"):
            pass
    with only_one(storage, "run"):  # given back
        assert (tmp_path / ".locks" / "run").read_text() == f"{me}\n"
    assert (tmp_path / ".locks" / "run").read_text() == ""


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

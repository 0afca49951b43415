"""What a killed writer left goes with the next writer; what others are writing stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from raymem.storage import unfinished as room
from raymem.storage.unfinished import PREFIX, temporary, unfinished, unfinished_name

LONG_AGO = 1e9


def write_until_killed(parent: str, ready: Connection) -> None:
    with unfinished(Path(parent), "data") as directory:
        (directory / "half").write_text("half")
        ready.send(directory.name)
        signal.pause()


def test_what_a_killed_writer_left_goes_and_what_lives_stays(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    writer = multiprocessing.get_context("fork").Process(target=write_until_killed, args=(str(tmp_path), theirs))
    writer.start()
    name = ours.recv()
    try:
        with unfinished(tmp_path, "data") as mine:
            assert {path.name for path in tmp_path.iterdir()} == {name, mine.name}
    finally:
        writer.kill()
        writer.join()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with unfinished(tmp_path, "other") as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert not list(tmp_path.iterdir())


def test_another_nodes_directory_goes_by_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(room, "_node", lambda: "elsewhere")
        young, old = tmp_path / unfinished_name("data"), tmp_path / unfinished_name("data")
    for directory in (young, old):
        directory.mkdir()
    os.utime(old, (LONG_AGO, LONG_AGO))
    with unfinished(tmp_path, "data"):
        assert young.is_dir() and not old.exists()


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_locks", lambda descriptor: None)
    left = tmp_path / unfinished_name("data")
    left.mkdir()
    with unfinished(tmp_path, "data") as mine:
        assert left.is_dir() and mine.name.startswith(PREFIX)
    os.utime(left, (LONG_AGO, LONG_AGO))
    with unfinished(tmp_path, "data"):
        assert not left.exists()


def hold_until_killed(ready: Connection) -> None:
    directory = temporary("checkpoint")
    ready.send(directory.name)
    signal.pause()


def test_temporary_directories_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "raymem-cache-0").mkdir()
    os.utime(tmp_path / "raymem-cache-0", (LONG_AGO, LONG_AGO))
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold_until_killed, args=(theirs,))
    holder.start()
    left = Path(ours.recv())
    try:
        with temporary("export") as mine:
            assert left.is_dir() and Path(mine).stat().st_mode & 0o777 == 0o700
    finally:
        holder.kill()
        holder.join()
    assert {path.name for path in tmp_path.iterdir()} == {"raymem-cache-0", left.name}
    with temporary("export"):
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["raymem-cache-0"]

"""A storage is known again by its id, and nothing makes it anew while a run works on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import StorageError
from raymem.storage.folders import make_directory, make_shared
from raymem.storage.identity import FILE, check_id, held, identify, read_id
from raymem.storage.publish import publish
from raymem.storage.storage import Storage


def test_a_storage_keeps_its_id_and_another_one_has_another(tmp_path: Path) -> None:
    first = identify(tmp_path / "a")
    assert identify(tmp_path / "a") == first == read_id(tmp_path / "a")
    assert identify(tmp_path / "b") != first
    assert os.listdir(tmp_path / "a") == [FILE]


def writes(root: Path) -> dict[str, Any]:
    """Everything that makes directories in a storage."""
    storage = Storage.open(str(root))
    return {
        "json": lambda: storage.write_json("run/facts.json", 1),
        "child": lambda: storage.child("run").write_json("facts.json", 1),
        "probe": storage.check_writable,
        "directory": lambda: make_directory(root / "run"),
        "shared": lambda: make_shared(root / "cache" / "data"),
        "published": lambda: publish(root / "cache" / "data" / "key", lambda directory: {}),
        "id": lambda: identify(root),
    }


@pytest.mark.parametrize("kind", writes(Path("/")))
@pytest.mark.parametrize("left", ["nothing", "an empty directory", "another storage"])
def test_what_is_gone_is_not_made_again(tmp_path: Path, kind: str, left: str) -> None:
    root = tmp_path / "runs"
    with held(root):
        writes(root)[kind]()
        root.rename(tmp_path / "away")
        if left != "nothing":
            root.mkdir()
        if left == "another storage":
            (root / FILE).write_text('{"id": "b"}')
        before = sorted(tmp_path.glob("runs/**"))
        reason = "its .* names another storage" if left == "another storage" else "it has no"
        with pytest.raises(StorageError, match=rf"{root} on {platform.node()} is not .* \({reason}.*mount the storage"):
            writes(root)[kind]()
        assert sorted(tmp_path.glob("runs/**")) == before
    writes(root)[kind]()  # the next run begins where it is told to


def test_a_process_elsewhere_is_told_which_storage_it_is(tmp_path: Path) -> None:
    known = identify(tmp_path / "runs")
    with held(tmp_path / "runs", known):
        make_directory(tmp_path / "runs" / "run")
    with pytest.raises(StorageError, match="is not the storage that this run began on"), held(tmp_path / "b", known):
        pass
    assert not (tmp_path / "b").exists()
    check_id(tmp_path / "runs", known)


@pytest.mark.parametrize("text", ["", "[]", '{"id": 3}', "\0"])
def test_a_damaged_id_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(StorageError, match=rf"{FILE}.*the next run then makes a new one$"):
        identify(tmp_path)

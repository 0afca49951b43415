"""Small JSON files that somebody else has touched: one sentence says which file, what is wrong and what mends it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from raymem.errors import ModelError, StorageError
from raymem.storage import json_files
from raymem.storage.json_files import read_object
from raymem.storage.publish import read_manifest
from raymem.storage.storage import Storage

FIELDS = {"name": (str, type(None)), "rank": (int,), "scale": (float,)}
GOOD = {"name": None, "rank": 4, "scale": 2}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not JSON (Expecting value"),
        ('{"rank": 4', "is not JSON ("),
        ("\x00\xff", "is not JSON ("),
        ("[" * 200_000, "nested too deeply"),
        ("1" * 5000, "is not JSON ("),
        ("[]", "holds a list in place of an object"),
        ("null", "holds null in place of an object"),
        ("{}", "has no rank"),
        (json.dumps({**GOOD, "rank": "x"}), "rank is a text ('x') in place of a whole number"),
        (json.dumps({**GOOD, "rank": True}), "rank is true or false (True) in place of a whole number"),
        (json.dumps({**GOOD, "name": []}), "name is a list ([]) in place of a text or null"),
        (json.dumps({**GOOD, "rank": "x" * 10_000}), "..."),
    ],
)
def test_what_is_wrong_is_said_with_the_file_and_the_cure(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ModelError) as caught:
        read_object(path, ModelError, "take another copy", FIELDS)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert problem in said
    assert said.endswith("; take another copy")
    assert len(said) < len(str(path)) + 250
    with pytest.raises(StorageError, match=r"facts\.json"):
        Storage.open(str(tmp_path)).read_object("facts.json", FIELDS)


def test_a_file_without_a_fault_is_read(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps({**GOOD, "more": [1]}))
    assert read_object(tmp_path / "facts.json", ModelError, "", FIELDS) == {**GOOD, "more": [1]}
    (tmp_path / "facts.json").write_text(json.dumps({"rank": 4, "scale": 0.5}))
    assert read_object(tmp_path / "facts.json", ModelError, "", FIELDS)["scale"] == 0.5


def test_a_missing_and_a_huge_file_are_errors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"facts\.json cannot be read \(No such file"):
        read_object(tmp_path / "facts.json", ModelError, "take another copy")
    monkeypatch.setattr(json_files, "LIMIT_BYTES", 8)
    (tmp_path / "facts.json").write_text('{"a": "longer than that"}')
    with pytest.raises(ModelError, match="has more than"):
        read_object(tmp_path / "facts.json", ModelError, "take another copy")


def test_a_pipe_and_a_device_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "device.json"):
        with pytest.raises(ModelError, match=rf"{name} cannot be read \(it is no regular file\); take another copy"):
            read_object(tmp_path / name, ModelError, "take another copy")
        for read in (Storage.read_object, Storage.read_bytes, Storage.sha256):
            with pytest.raises(StorageError, match=f"{name}.*it is no regular file"):
                read(Storage.open(str(tmp_path)), name)
    os.mkfifo(tmp_path / "manifest.json")
    assert read_manifest(tmp_path) is None

"""The list of digests beside what leaves raymem: what it notices, and what it leaves to the user."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from raymem.errors import ModelError, StorageError
from raymem.storage.checksums import CHECKSUMS, add_checksum, check_files, difference, write_checksums
from raymem.storage.storage import Storage


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "below").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(100)))
    (made / "below" / "chat.jinja").write_text("template")
    (made / "README.md").write_text("a card")
    write_checksums(made)
    return made


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_sha256sum_reads_the_list(directory: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", CHECKSUMS], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 3


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "below/chat.jinja"])
def test_a_flipped_bit_is_named_with_both_digests_and_the_cure(directory: Path, name: str) -> None:
    check_files(directory, ModelError)
    flip(directory / name, 5)
    with pytest.raises(ModelError) as caught:
        check_files(directory, ModelError)
    said = str(caught.value)
    assert str(directory / name) in said and said.count("...") == 2
    assert f"delete {directory / CHECKSUMS}" in said
    (directory / CHECKSUMS).unlink()
    check_files(directory, ModelError)


def test_weights_are_read_only_where_they_count(directory: Path) -> None:
    flip(directory / "model.safetensors", 5)
    assert difference(directory, weights=False) is None
    assert difference(directory) is not None


def test_what_people_add_or_describe_is_theirs(directory: Path) -> None:
    (directory / "README.md").write_text("another card")
    (directory / "notes.txt").write_text("mine")
    assert difference(directory) is None
    (directory / "config.json").unlink()
    assert "config.json is listed in raymem.sha256 but cannot be read" in str(difference(directory))


def test_a_flipped_bit_of_the_list_is_noticed(directory: Path) -> None:
    path = directory / CHECKSUMS
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 11):  # all positions in a byte
        flip(path, bit)
        assert difference(directory) is not None, bit
        path.write_bytes(whole)
    assert difference(directory) is None


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "below/../../outside"])
def test_a_list_names_files_of_its_directory_only(directory: Path, name: str) -> None:
    (directory.parent / "outside").write_text("x")
    (directory / CHECKSUMS).write_text(f"{'0' * 64}  {name}\n")
    assert "line 1 is no digest and name of a file of the directory" in str(difference(directory))


def test_a_file_that_is_written_later_is_listed(directory: Path) -> None:
    (directory / "later.json").write_text("{}")
    add_checksum(directory, "later.json")
    assert difference(directory) is None
    flip(directory / "later.json", 1)
    assert "later.json" in str(difference(directory))
    (directory / CHECKSUMS).write_text("?\n")
    with pytest.raises(StorageError, match=r"raymem\.sha256 is damaged"):
        add_checksum(directory, "later.json")


def test_a_record_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    storage.write_record("a.json", {"loss": 1.5, "key": "k"})
    assert storage.read_record("a.json") == {"loss": 1.5, "key": "k"}
    path = tmp_path / "a.json"
    path.write_text(path.read_text().replace("1.5", "1.7"))
    with pytest.raises(StorageError, match=r"a\.json has other values than were written .*; delete it and run again"):
        storage.read_record("a.json", cure="delete it and run again")
    storage.write_json("a.json", {"loss": 1.5})  # an earlier version wrote no digest
    assert storage.read_record("a.json") == {"loss": 1.5}

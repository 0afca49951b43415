"""What is remembered of a file, and when it is read again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from raymem.errors import DataError
from raymem.training.data import readers
from raymem.training.data.readers import FileBlock
from raymem.training.data.sources import digests
from raymem.training.data.sources.digests import content_digest, index_of

OLD_NS = 1_600_000_000_123_456_789


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, in order; a file counts as settled at once."""
    names: list[str] = []
    index = readers.index_file

    def counting(path: Path, block_rows: int, name: str) -> tuple[str, list[FileBlock]]:
        names.append(path.name)
        return index(path, block_rows, name)

    monkeypatch.setattr(digests, "index_file", counting)
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    return names


def write(path: Path, text: str, mtime_ns: int = OLD_NS) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def test_a_file_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    path = write(tmp_path / "x.jsonl", '{"n": 1}\n{"n": 2}\n')
    first = index_of(path, "its name", tmp_path / "cache", 1)
    assert index_of(path, "its name", tmp_path / "cache", 1) == first
    assert [block.name for block in first[1]] == ["its name", "its name"]
    assert reads == ["x.jsonl"]
    index_of(path, "its name", tmp_path / "cache", 2)
    assert reads == ["x.jsonl"] * 2


def test_moved_files_and_folders_are_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    path = write(tmp_path / "d" / "x.jsonl", '{"n": 1}\n')
    content, _ = index_of(path, "x", tmp_path / "cache", 1)
    path.rename(tmp_path / "d" / "y.jsonl")
    (tmp_path / "d").rename(tmp_path / "e")
    found, blocks = index_of(tmp_path / "e" / "y.jsonl", "y", tmp_path / "cache", 1)
    assert (found, [block.path for block in blocks]) == (content, [str(tmp_path / "e" / "y.jsonl")])
    assert reads == ["x.jsonl"]


def test_other_contents_are_never_taken_for_the_old_ones(tmp_path: Path, reads: list[str]) -> None:
    path = write(tmp_path / "x.jsonl", '{"n": 1}\n')
    keys = {index_of(path, "x", tmp_path / "cache", 1)[0]}
    write(path, '{"n": 2}\n')  # in place: same size, and the time set back
    keys.add(index_of(path, "x", tmp_path / "cache", 1)[0])
    other = write(tmp_path / "new.jsonl", '{"n": 3}\n')
    other.replace(path)
    keys.add(index_of(path, "x", tmp_path / "cache", 1)[0])
    assert len(keys) == len(reads) == 3


def test_a_file_that_was_just_written_is_not_trusted_yet(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", 3600 * 10**9)
    path = write(tmp_path / "x.jsonl", '{"n": 1}\n')
    for _ in range(2):
        index_of(path, "x", tmp_path / "cache", 1)
    assert len(reads) == 2
    hours = time.time_ns() + 5 * 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: hours)  # by the clock of the node only
    for _ in range(2):
        index_of(path, "x", tmp_path / "cache", 1)
    assert len(reads) == 4
    assert os.listdir(tmp_path / "cache" / digests.FOLDER) == []


def test_new_permissions_while_it_is_read_do_no_harm(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.jsonl", '{"n": 1}\n')
    index = readers.index_file

    def meanwhile(*arguments: object) -> object:
        path.chmod(0o600)
        return index(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(digests, "index_file", meanwhile)
    assert len(index_of(path, "x", tmp_path / "cache", 1)[1]) == 1


def test_a_touched_file_is_hashed_again_to_the_same_key(tmp_path: Path, reads: list[str]) -> None:
    path = write(tmp_path / "x.jsonl", '{"n": 1}\n')
    content, _ = index_of(path, "x", tmp_path / "cache", 1)
    os.utime(path)
    assert index_of(path, "x", tmp_path / "cache", 1)[0] == content


def test_a_file_that_is_written_meanwhile_is_refused(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.jsonl", '{"n": 1}\n')
    index = readers.index_file

    def appended(*arguments: object) -> object:
        found = index(*arguments)  # type: ignore[arg-type]
        with path.open("a") as file:
            file.write('{"n": 2}\n')
        return found

    monkeypatch.setattr(digests, "index_file", appended)
    with pytest.raises(DataError, match="its name changed while it was read: run again"):
        index_of(path, "its name", tmp_path / "cache", 1)


def test_damage_and_a_cache_that_cannot_be_written_cost_time_only(tmp_path: Path, reads: list[str]) -> None:
    path = write(tmp_path / "x.jsonl", '{"n": 1}\n')
    first = index_of(path, "x", tmp_path / "cache", 1)
    for entry in (tmp_path / "cache" / "digests").iterdir():
        entry.write_text("{")
    assert index_of(path, "x", tmp_path / "cache", 1) == first
    (tmp_path / "file").write_text("")
    assert index_of(path, "x", tmp_path / "file", 1) == first
    assert len(reads) == 3


def test_the_digest_of_raw_bytes_is_remembered_too(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.gz", "bytes")
    first = content_digest(path, tmp_path / "cache")
    monkeypatch.setattr(digests, "file_sha256", lambda _: pytest.fail("read again"))
    assert content_digest(path, tmp_path / "cache") == first
    with pytest.raises(DataError, match=r"gone\.gz cannot be read \(No such file"):
        content_digest(tmp_path / "gone.gz", tmp_path / "cache")

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import DataError, StorageError
from raymem.storage.publish import MANIFEST, digest, publish, read_manifest, verify


def write_two(directory: Path) -> dict[str, Any]:
    (directory / "a").write_bytes(b"one")
    (directory / "sub").mkdir()
    (directory / "sub" / "b").write_bytes(b"three")
    return {"rows": 2}


def never(directory: Path) -> dict[str, Any]:
    raise AssertionError("a finished directory is not built again")


def test_a_published_directory_is_whole_verified_and_built_once(tmp_path: Path) -> None:
    manifest = publish(tmp_path / "key", write_two)
    assert manifest["facts"] == {"rows": 2}
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {"a": 3, "sub/b": 5}
    assert verify(tmp_path / "key") == manifest == publish(tmp_path / "key", never)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def write(directory: Path) -> dict[str, Any]:
        write_two(directory)
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        publish(tmp_path / "key", write)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_before_its_manifest_is_not_taken_for_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_die(directory: Path) -> dict[str, Any]:
        write_two(directory)
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    child = os.fork()
    if child == 0:
        publish(tmp_path / "key", write_and_die)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "a").exists() and read_manifest(left) is None and read_manifest(tmp_path / "key") is None
    publish(tmp_path / "key", write_two)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("damage", ["manifest", "missing", "short"])
def test_a_damaged_directory_is_built_again(tmp_path: Path, damage: str) -> None:
    publish(tmp_path / "key", write_two)
    if damage == "short":
        (tmp_path / "key" / "a").write_bytes(b"on")
    else:
        (tmp_path / "key" / {"manifest": MANIFEST, "missing": "a"}[damage]).unlink()
    assert read_manifest(tmp_path / "key") is None
    publish(tmp_path / "key", write_two)
    verify(tmp_path / "key")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("name", ["a", "sub/b", MANIFEST])
@pytest.mark.parametrize("at", range(0, 400, 19))
def test_a_flipped_bit_is_noticed_and_mended(tmp_path: Path, name: str, at: int, caplog: Any) -> None:
    publish(tmp_path / "key", write_two)
    publish(tmp_path / "key", never)
    whole = (tmp_path / "key" / name).read_bytes()
    damaged = bytearray(whole)
    damaged[at % len(whole)] ^= 1 << at % 8
    (tmp_path / "key" / name).write_bytes(damaged)
    publish(tmp_path / "key", write_two)
    assert f"{tmp_path / 'key'} is damaged and made again" in caplog.text
    verify(tmp_path / "key")
    assert (tmp_path / "key" / name).read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "[" * 9999, '{"files": 1}', '{"files": {"a": 3}}', '{"files": []}']
)
def test_a_manifest_that_is_none_is_made_again(tmp_path: Path, text: str) -> None:
    publish(tmp_path / "key", write_two)
    (tmp_path / "key" / MANIFEST).write_text(text)
    assert read_manifest(tmp_path / "key") is None
    assert publish(tmp_path / "key", write_two) == verify(tmp_path / "key")


def test_files_are_read_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "key", write_two)
    publish(tmp_path / "key", never)
    monkeypatch.setattr("raymem.storage.publish.file_sha256", lambda _: pytest.fail("read again"))
    publish(tmp_path / "key", never)


def test_the_slower_of_two_writers_gives_way(tmp_path: Path) -> None:
    def slow(directory: Path) -> dict[str, Any]:
        publish(tmp_path / "key", write_two)
        return write_two(directory)

    publish(tmp_path / "key", slow)
    verify(tmp_path / "key")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_verify_finds_one_changed_byte(tmp_path: Path) -> None:
    publish(tmp_path / "key", write_two)
    (tmp_path / "key" / "a").write_bytes(b"0ne")
    with pytest.raises(DataError, match=r"key/a has SHA-256 .* delete the directory"):
        verify(tmp_path / "key")


def test_an_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/key: not a directory; .* storage\.path"):
        publish(tmp_path / "file" / "key", write_two)


def test_digest_ignores_the_order_of_keys_only() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})

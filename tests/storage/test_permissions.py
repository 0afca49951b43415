"""What is shared takes over the rights of those who may write in its directory, and nothing else changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymem.storage.folders import make_shared, share_published
from raymem.storage.identity import identify
from raymem.storage.permissions import by_umask, make_file, open_lock, share


@pytest.fixture(autouse=True)
def _secretive() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize(
    ("above", "directory", "readable", "writable"),
    [
        (0o700, 0o700, 0o600, 0o600),
        (0o755, 0o700, 0o600, 0o600),  # readable by others is not shared with them
        (0o775, 0o770, 0o640, 0o660),
        (0o2770, 0o2770, 0o640, 0o660),
        (0o777, 0o777, 0o644, 0o666),
        (0o1777, 0o1777, 0o644, 0o666),
    ],
)
def test_rights_by_the_directory_above(
    tmp_path: Path, above: int, directory: int, readable: int, writable: int
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(above)
    identify(root)
    make_shared(root / "cache" / "data")
    for path in (root / "cache", root / "cache" / "data"):
        assert mode(path) == directory
    (root / "cache" / "key").mkdir()
    (root / "cache" / "key" / "shard").write_text("x")
    (root / "cache" / "link").symlink_to(tmp_path)
    share_published(root / "cache" / "key")
    assert mode(root / "cache" / "key" / "shard") == readable
    assert mode(root / "cache" / "key") & 0o022 == 0
    make_file(root / "facts", "x")
    assert mode(root / "facts") == readable
    with open_lock(root / "lock"):
        assert mode(root / "lock") == writable
    share(root / "cache" / "link", writable=True)
    assert mode(tmp_path) == 0o700


def test_outside_of_a_storage_the_umask_counts(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    make_shared(tmp_path / "a" / "b")
    share_published(tmp_path / "a" / "b")
    assert mode(tmp_path / "a") == mode(tmp_path / "a" / "b") == 0o700


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    make_file(tmp_path / "x", "first")
    make_file(tmp_path / "x", "second")
    assert (tmp_path / "x").read_text() == "first"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    make_file(tmp_path / "x", "first")
    make_file(tmp_path / "x", "second")
    assert (tmp_path / "x").read_text() == "first"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_file_that_a_library_kept_for_its_owner_gets_what_the_umask_gives(tmp_path: Path, umask: int) -> None:
    os.umask(umask)
    (tmp_path / "below").mkdir()
    kept, shared = tmp_path / "below" / "weights", tmp_path / "shared"
    for path, own in ((kept, 0o600), (shared, 0o666)):
        path.touch()
        path.chmod(own)
    (tmp_path / "link").symlink_to("/etc/hostname")
    by_umask(tmp_path)
    assert mode(kept) == 0o666 & ~umask
    assert mode(shared) == 0o666, "what others may do already stays"
    assert sorted(os.listdir(tmp_path)) == ["below", "link", "shared"]

"""The cache of a machine: within its limit to the byte, and nothing goes that a living process uses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raymem import cache, entries
from raymem.errors import StorageError
from raymem.storage.publish import verify

LONG_AGO = 1_000_000_000
HOLDER = """
import sys
import time
from pathlib import Path
from raymem.entries import hold
print(hold(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""
MAKER = """
import sys
import time
from pathlib import Path
from raymem.cache import cache_root, publish_entry
from raymem.entries import _held
from raymem.storage.publish import verify

def write(directory):
    (directory / "shard").write_bytes(bytes(1000))
    return {}

for number in range(40):
    directory = cache_root() / "data" / f"{(number * int(sys.argv[1])) % 41:02}"
    publish_entry(directory, write)
    verify(directory)
    import os
    os.close(_held.pop(directory))  # as if it was another process each time
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, of which this process holds nothing in the end."""
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))
    held = dict(entries._held)
    yield tmp_path / "cache"
    for path in entries._held.keys() - held.keys():
        os.close(entries._held.pop(path))


def entry(root: Path, name: str, num_bytes: int, used: int) -> Path:
    """An entry of two files that was used ``used`` seconds after a time long ago."""
    path = root / "data" / name
    path.mkdir(parents=True)
    (path / "shard").write_bytes(bytes(num_bytes - 10))
    (path / "below").mkdir()
    (path / "below" / "index").write_bytes(bytes(10))
    os.utime(path, (LONG_AGO + used,) * 2)
    return path


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "data").iterdir())


def test_what_was_used_longest_ago_goes_first_and_no_more_than_must(root: Path) -> None:
    for number, name in enumerate("abcd"):
        entry(root, name, 400, number)
    (root / "plans").mkdir()
    (root / "plans" / "old.json").write_bytes(bytes(5))
    os.utime(root / "plans" / "old.json", (LONG_AGO - 1,) * 2)
    (root / "calibration.json").write_bytes(bytes(5))
    entries.make_room(root, 1605)
    assert names(root) == ["a", "b", "c", "d"] and list((root / "plans").iterdir()), "all of it fits to the byte"
    entries.make_room(root, 1604)
    assert names(root) == ["a", "b", "c", "d"] and not list((root / "plans").iterdir())
    assert entries.hold(root / "data" / "a"), "which is a use"
    entries.make_room(root, 1199)
    assert names(root) == ["a", "d"], "800 bytes: with 400 more it would have 1200"
    assert (root / "calibration.json").exists(), "what lies in no folder of the cache is no entry"


def test_what_another_process_uses_stays_until_that_has_ended(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    used, free = entry(root, "used", 400, 0), entry(root, "free", 400, 1)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(used)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        os.utime(used, (LONG_AGO,) * 2)
        entries.make_room(root, 100)
        assert names(root) == ["used"] and not free.exists()
        assert f"{root} holds 400 B, more than RAYMEM_CACHE_LIMIT=100 B: the rest is in use" in caplog.text
        process.kill()
    entries.make_room(root, 100)
    assert names(root) == []


def test_an_entry_that_was_removed_is_not_held(root: Path) -> None:
    gone = entry(root, "gone", 400, 0)
    entries.make_room(root, 0)
    assert not entries.hold(gone)
    made_again = entry(root, "gone", 400, 0)
    assert entries.hold(made_again)
    entries.make_room(root, 0)
    assert names(root) == ["gone"], "not by the process that uses it either"


def test_two_processes_make_room_for_each_other(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each makes or finds is whole, and in the end there is no more than the limit, to the byte."""
    monkeypatch.setenv("RAYMEM_CACHE_LIMIT", "6000")
    makers = [subprocess.Popen([sys.executable, "-c", MAKER, step], stderr=subprocess.PIPE) for step in ("1", "7")]
    said = [maker.communicate(timeout=120)[1].decode() for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0], said
    entries.make_room(root, cache.limit_bytes())
    sizes = [file.stat().st_size for file in (root / "data").rglob("*") if file.is_file()]
    assert 6000 - 1400 < sum(sizes) <= 6000, "one more would have fitted"
    for path in (root / "data").iterdir():
        verify(path)


def test_only_what_lies_in_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMEM_CACHE_LIMIT", "1")
    made = tmp_path / "storage" / "cache" / "data" / "key"
    for _ in range(2):
        cache.publish_entry(made, lambda directory: {"size": (directory / "shard").write_bytes(bytes(400))})
    assert (made / "shard").stat().st_size == 400 and made not in entries._held


def test_a_limit_that_is_no_size_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMEM_CACHE_LIMIT", "fifty")
    with pytest.raises(StorageError, match=r"^RAYMEM_CACHE_LIMIT: 'fifty' is no amount of memory; write it as"):
        cache.publish_entry(root / "data" / "key", lambda directory: {})
    monkeypatch.delenv("RAYMEM_CACHE_LIMIT")
    assert cache.limit_bytes() == 50 * 2**30


def test_plans_count_and_go_as_well(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = root / "plans" / "a.json"
    cache.write_json(file, {"peak": 1})
    size = file.stat().st_size
    monkeypatch.setenv("RAYMEM_CACHE_LIMIT", str(2 * size))
    os.utime(file, (LONG_AGO,) * 2)
    cache.write_json(root / "plans" / "b.json", {"peak": 2})
    assert cache.read_json(file) == {"peak": 1}, "and reading is a use"
    os.utime(root / "plans" / "b.json", (LONG_AGO,) * 2)
    cache.write_json(root / "plans" / "c.json", {"peak": 3})
    assert sorted(path.name for path in (root / "plans").iterdir()) == ["a.json", "c.json"]


def test_without_locks_an_entry_is_in_use_for_a_week(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    old, new = entry(root, "old", 400, 0), entry(root, "new", 400, 0)
    week_ago = time.time() - 7 * 24 * 3600
    os.utime(old, (week_ago - 60,) * 2)
    os.utime(new, (week_ago + 60,) * 2)
    entries.make_room(root, 0)
    assert names(root) == ["new"]


def test_what_is_used_while_room_is_made_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking at all entries and removing them, another process used one, and is gone again."""
    seen = entries._entries

    def used_meanwhile(root: Path) -> list[entries._Entry]:
        found = list(seen(root))
        os.utime(root / "data" / "used")
        return found

    entry(root, "used", 400, 0)
    entry(root, "free", 400, 1)
    monkeypatch.setattr(entries, "_entries", used_meanwhile)
    entries.make_room(root, 400)
    assert names(root) == ["used"]

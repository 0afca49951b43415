"""A lease has one holder; a dead one loses it, by the watcher's own clock, and one that lost it writes no more."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from raymem.errors import StorageError, TransientStorageError
from raymem.storage.identity import held
from raymem.storage.leases import lease, record
from raymem.storage.leases.cells import Changed, FileCell, Version, run_cell
from raymem.storage.leases.held import holder_of
from raymem.storage.leases.lease import leased, watched
from raymem.storage.leases.record import Record, read_record
from raymem.storage.storage import Storage
from tests.helpers.faulty_proxy import proxy_before

BEAT_S = 0.05
DURATION_S = 0.6


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", BEAT_S)
    monkeypatch.setattr(record, "DURATION_S", DURATION_S)
    monkeypatch.setattr("raymem.storage.connect.TRIES", 1)


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """With a directory for locks, and a run whose lease nobody holds."""
    root = str(tmp_path) if request.param == "directory" else request.getfixturevalue("s3_uri")
    opened = Storage.open(root, retry_for_s=0).child("storage" if request.param == "directory" else tmp_path.name)
    opened.write_bytes(".locks/run", b"")
    return opened


def take(storage: Storage) -> AbstractContextManager[None]:
    run = storage.child("run")
    return leased(run_cell(storage, "run"), run.path, run.root, 0)


def foreign(**changes: object) -> Record:
    """The record of a driver of another host."""
    values = {"holder": "theirs", "host": "other", "node": "elsewhere", "pid": 7, "user": "ann", **changes}
    return dataclasses.replace(Record.own(), **values)  # type: ignore[arg-type]


def put(storage: Storage, theirs: Record) -> None:
    """Write a record whatever is there, as a store would hold it after that driver's own conditional write."""
    storage.write_bytes(".locks/run", theirs.to_bytes())


def now(storage: Storage) -> Record | None:
    return read_record(storage.read_bytes(".locks/run"))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def renewed(storage: Storage, theirs: Record) -> Iterator[None]:
    """Another host's driver that lives."""
    done = threading.Event()

    def renew() -> None:
        current = theirs
        while not done.wait(BEAT_S):
            current = current.renewed()
            put(storage, current)

    put(storage, theirs)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_one_holds_it_renews_it_and_gives_it_back(storage: Storage) -> None:
    with take(storage):
        mine = now(storage)
        assert mine is not None and mine.holder == holder_of(storage.child("run").root)
        with pytest.raises(StorageError, match=rf"run.*another process is training this run \({mine}\); wait for it"):
            take(storage).__enter__()
        until(lambda: (record := now(storage)) is not None and record.beat > 1)
        storage.write_bytes("run/file", b"mine")
    assert storage.read_bytes(".locks/run") == b"" and holder_of(storage.child("run").root) is None
    with take(storage):
        assert (again := now(storage)) is not None and again.holder != mine.holder


@pytest.mark.parametrize("since", ["1970-01-01 00:00:00 UTC", "2999-01-01 00:00:00 UTC"])
def test_clocks_that_differ_steal_nothing(storage: Storage, since: str) -> None:
    theirs = foreign(since=since)
    with renewed(storage, theirs), pytest.raises(StorageError, match=f"ann on other, process 7, since {since}"):
        take(storage).__enter__()
    put(storage, theirs)
    began = time.monotonic()
    with take(storage):
        assert time.monotonic() - began > DURATION_S, "a dead one's lease is watched for its whole duration"


def test_what_is_given_back_while_it_is_watched_is_taken_at_once(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    put(storage, foreign(duration_s=300))
    threading.Timer(0.2, storage.write_bytes, (".locks/run", b"")).start()
    with take(storage):
        assert "held by ann on other, process 7" in caplog.text and "waiting up to 300 s" in caplog.text


def test_a_holder_that_was_killed_on_this_host_is_not_waited_for(storage: Storage) -> None:
    program = (
        "import sys; from raymem.storage.leases.record import Record; "
        "sys.stdout.write(Record.own().to_bytes().decode()); sys.stdout.flush(); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    theirs = read_record(process.stdout.readline())
    assert theirs is not None
    theirs = dataclasses.replace(theirs, duration_s=300)
    put(storage, theirs)
    with pytest.raises(StorageError, match=f"process {process.pid}"):
        take(storage).__enter__()
    process.kill()
    until(lambda: theirs.is_alive is False)  # also while nobody has asked for its status
    with take(storage):
        pass
    process.communicate()
    recycled = dataclasses.replace(Record.own(), process_began="1")
    assert recycled.is_alive is False, "a number that is used again is another process"


def test_a_stolen_lease_stops_its_holder(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    run, thief = storage.child("run"), foreign(holder="thief")
    lost = "the lease on this run was taken by ann on other, process 7, .* it writes nothing more"
    with take(storage):
        run.write_bytes("before", b"")
        put(storage, thief)
        until(lambda: "was taken by ann on other" in caplog.text)
        for write in (
            lambda: run.write_bytes("after", b""),
            lambda: run.delete_dir("before", last=None),
            lambda: storage.rename_dir("run", "run.old"),
            lambda: run.upload_dir(Path(__file__).parent, "after", last=None),
        ):
            with pytest.raises(StorageError, match=lost):
                write()
        storage.write_bytes("beside", b"")
        assert run.read_bytes("before") == b"" and not run.exists("after")
    assert now(storage) == thief, "it is not given back in the other's place"


def test_a_worker_stops_with_its_driver(storage: Storage) -> None:
    run, cell = storage.child("run"), run_cell(storage, "run")
    mine = foreign(holder="mine")
    put(storage, mine)
    with watched(cell, run.path, run.root, "mine"):
        run.write_bytes("before", b"")
        put(storage, mine.renewed())
        time.sleep(3 * BEAT_S)
        run.write_bytes("before", b"")
        put(storage, foreign(holder="thief", user="eve"))
        time.sleep(3 * BEAT_S)
        with pytest.raises(StorageError, match="was taken by eve on other"):
            run.write_bytes("after", b"")
    assert not run.exists("after")
    storage.write_bytes(".locks/run", b"")
    with pytest.raises(StorageError, match="the lease on this run has been given back"):
        watched(cell, run.path, run.root, "mine").__enter__()


def test_a_file_that_was_deleted_gives_the_lease_to_nobody(s3_uri: str, tmp_path: Path) -> None:
    storage = Storage.open(s3_uri).child(tmp_path.name)
    with take(storage):
        mine = now(storage)
        storage.filesystem.delete_file(f"{storage.root}/.locks/run")
        until(lambda: storage.exists(".locks/run"))
        assert mine is not None and (back := now(storage)) is not None and back.holder == mine.holder


def test_an_outage_costs_no_lease(s3_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with proxy_before(s3_uri) as proxy:
        storage = Storage.open(proxy.uri(s3_uri), retry_for_s=0).child(tmp_path.name)
        run = storage.child("run")
        with take(storage):
            proxy.away("refuse")
            until(lambda: "the lease cannot be renewed now" in caplog.text)
            time.sleep(3 * BEAT_S)
            with pytest.raises(TransientStorageError):
                run.write_bytes("file", b"")
            proxy.back()
            until(lambda: (record := now(storage)) is not None and record.beat > 1)
            run.write_bytes("file", b"")
        assert storage.read_bytes(".locks/run") == b""


def test_a_bucket_that_is_gone_takes_no_lease(s3_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    import boto3

    storage = Storage.open(s3_uri.replace("raymem-test", "raymem-gone"), retry_for_s=0)
    endpoint = dict(pair.split("=") for pair in s3_uri.partition("?")[2].split("&"))["endpoint_override"]
    client = boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1")
    client.create_bucket(Bucket="raymem-gone")
    with take(storage):
        client.delete_object(Bucket="raymem-gone", Key=f"{storage.root.partition('/')[2]}/.locks/run")
        client.delete_bucket(Bucket="raymem-gone")
        until(lambda: "create the bucket, or correct its name" in caplog.text)
        time.sleep(3 * BEAT_S)
        with pytest.raises(StorageError, match="create the bucket, or correct its name"):
            storage.child("run").write_bytes("file", b"")
    assert "could not be given back, and expires by itself" in caplog.text
    client.create_bucket(Bucket="raymem-gone")
    put(storage, Record.own())  # as such a one, which came back with its bucket
    with take(storage):
        pass


class Memory:
    """A cell in memory whose store does as it is told."""

    place = "memory"

    def __init__(self, data: bytes, *, ignores: bool = False) -> None:
        self.data, self.ignores = data, ignores
        self.away = False

    def read(self) -> Version | None:
        if self.away:
            raise TransientStorageError("storage: away")
        return Version(self.data)

    def write(self, data: bytes, over: Version | None) -> Version:
        if not self.ignores and over != Version(self.data):
            raise Changed(self.place)
        self.data = data
        return Version(data)


def test_time_in_which_the_store_was_away_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that could not renew its lease either is given time to do so."""
    cell, clock = Memory(foreign(duration_s=60).to_bytes()), [0.0]
    ticks: list[float] = []

    def sleep(seconds: float) -> None:
        ticks.append(clock[0])
        clock[0] += 1000 if len(ticks) == 30 else seconds  # one look takes very long

    monkeypatch.setattr(lease, "RENEW_S", 10.0)
    monkeypatch.setattr(lease, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    seen = cell.read()
    assert seen is not None
    lease._outlived(cell, "run", seen, 0)
    assert 1088 < clock[0] < 1092, "the sixty seconds began anew"


def test_a_store_that_ignores_conditions_is_refused() -> None:
    with pytest.raises(StorageError, match=r"ignores If-None-Match, .* use another storage"):
        leased(Memory(b"", ignores=True), "run", "/run", 0).__enter__()


@pytest.mark.parametrize("data", [b"{}", b"[1", b"\xff", b'{"holder": 3}', b"[]"])
def test_a_cell_that_holds_something_else_is_waited_for(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "DURATION_S", 0.1)
    (tmp_path / "cell").write_bytes(data)
    assert read_record(data) is None
    with leased(FileCell(tmp_path / "cell"), "run", str(tmp_path / "run"), 0):
        assert "held by somebody; waiting" in caplog.text
    assert (tmp_path / "cell").read_bytes() == b""


def test_what_is_known_of_a_lease_is_known_to_whoever_makes_directories(tmp_path: Path) -> None:
    """Checkpoints of a directory are begun so."""
    from raymem.storage.folders import make_directory

    storage = Storage.open(str(tmp_path))
    storage.write_bytes(".locks/run", b"")
    with held(tmp_path), take(storage):
        make_directory(tmp_path / "run" / "a")
        put(storage, foreign())
        time.sleep(4 * BEAT_S)
        with pytest.raises(StorageError, match="was taken by ann on other"):
            make_directory(tmp_path / "run" / "b")
    assert not (tmp_path / "run" / "b").exists()

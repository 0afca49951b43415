"""A storage that is away for a while: waited for, said once, given up after the recipe's time; other errors at once."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from raymem.errors import StorageError, TransientStorageError
from raymem.storage import retry
from raymem.storage.connect import connect, copy_file
from raymem.storage.errors import explain
from raymem.storage.storage import Storage
from tests.helpers.faulty_proxy import FaultyProxy, ends_when_noticed, proxy_before

FILES = {"a": b"alpha", "b": os.urandom(100_000), "manifest.json": b"{}"}


@pytest.fixture(scope="module")
def proxy(s3_uri: str) -> Iterator[FaultyProxy]:
    with proxy_before(s3_uri) as before:
        yield before


@pytest.fixture
def away(proxy: FaultyProxy, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A storage behind the proxy, with files in ``here``; raymem alone waits for it, and soon no more."""
    monkeypatch.setattr("raymem.storage.connect.TRIES", 1)
    ends_when_noticed(proxy, monkeypatch)
    storage = Storage.open(proxy.uri(s3_uri)).child(tmp_path.name)
    (tmp_path / "local").mkdir()
    for name, content in FILES.items():
        (tmp_path / "local" / name).write_bytes(content)
    storage.upload_dir(tmp_path / "local", "here")
    yield storage
    proxy.back()


OPERATIONS: dict[str, Callable[[Storage, Path], object]] = {
    "exists": lambda storage, folder: storage.exists("here/a"),
    "list_dirs": lambda storage, folder: storage.list_dirs(),
    "sizes": lambda storage, folder: storage.sizes("here"),
    "read_bytes": lambda storage, folder: storage.read_bytes("here/b"),
    "sha256": lambda storage, folder: storage.sha256("here/b"),
    "read_json": lambda storage, folder: storage.read_json("here/manifest.json"),
    "write_json": lambda storage, folder: storage.write_json("new.json", {"a": 1}),
    "upload_dir": lambda storage, folder: storage.upload_dir(folder / "local", "there"),
    "download_dir": lambda storage, folder: storage.download_dir("here", folder / "to"),
    "delete_dir": lambda storage, folder: storage.delete_dir("here"),
    "rename_dir": lambda storage, folder: storage.rename_dir("here", "there"),
    "check_writable": lambda storage, folder: storage.check_writable(),
}
FAULTS: dict[str, Callable[[FaultyProxy], None]] = {
    "refuse": lambda proxy: proxy.away(),
    "reset": lambda proxy: proxy.away("reset"),
    "throttle": lambda proxy: proxy.throttle(),
    "errors": lambda proxy: proxy.errors(),
}


def contents(storage: Storage, name: str) -> dict[str, bytes]:
    return {file: storage.read_bytes(f"{name}/{file}") for file in storage.sizes(name)}


OFTEN = ("list_dirs", "write_json", "upload_dir", "download_dir")
"""Operations of the default tier: one for each fault."""


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=[] if name in OFTEN else pytest.mark.slow, id=name) for n, name in enumerate(OPERATIONS)],
)
def test_every_operation_waits_until_the_store_is_back(
    number: int, away: Storage, proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each with one of the faults, in turn; what it leaves is what it leaves without a fault."""
    name, fault = list(OPERATIONS)[number], list(FAULTS)[number % len(FAULTS)]
    (tmp_path / "straight").mkdir()
    (tmp_path / "straight" / "local").symlink_to(tmp_path / "local")
    plain = away.child("plain")
    plain.upload_dir(tmp_path / "local", "here")
    expected = OPERATIONS[name](plain, tmp_path / "straight")
    failed = proxy.failed
    FAULTS[fault](proxy)
    value = OPERATIONS[name](away, tmp_path)
    assert value == (["here", "plain"] if name == "list_dirs" else expected)
    assert fault == "refuse" or proxy.failed > failed
    assert len(caplog.records) >= 2
    for folder in ("here", "there"):
        assert contents(away, folder) == contents(plain, folder)
    if name == "download_dir":
        assert {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()} == FILES


def test_an_outage_is_said_once_and_its_end_too(
    away: Storage, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.throttle()
    before = proxy.requests
    assert away.read_bytes("here/a") == b"alpha"
    assert proxy.requests - before >= 3, "tried again and again"
    began, ended = (record.getMessage() for record in caplog.records if record.name == "raymem.storage.retry")
    assert began.startswith(f"storage: cannot read {away.join('here/a')}: ")
    assert began.endswith("trying again for up to 5 min")
    assert ended.startswith(f"storage: {away.path} is back after ")


def test_after_its_time_it_is_an_error_that_says_how_long(
    proxy: FaultyProxy, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymem.storage.connect.TRIES", 1)
    impatient = Storage.open(proxy.uri(s3_uri), 0.2).child("x")
    proxy.away()
    with pytest.raises(TransientStorageError, match=r"cannot read .*/x/a.*; check the network.* tried for \d s: run"):
        impatient.read_bytes("a")
    proxy.back()


@pytest.mark.parametrize("status", [403, 404])
def test_what_waiting_does_not_mend_fails_at_once(
    status: int, away: Storage, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.errors(status=status)
    before = proxy.requests
    with pytest.raises(StorageError) as caught:
        away.read_bytes("here/a")
    assert not isinstance(caught.value, TransientStorageError)
    assert proxy.requests - before <= 2
    assert not caplog.records


def test_many_single_failures_cost_nothing(
    away: Storage, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic))
    proxy.errors(rate=0.3)
    for number in range(2):
        away.upload_dir(tmp_path / "local", f"d{number}")
    proxy.back()
    for number in range(2):
        assert contents(away, f"d{number}") == FILES


@pytest.mark.parametrize(
    ("code", "passes"),
    [
        *((code, True) for code in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET)),
        *((code, False) for code in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EDQUOT)),
    ],
    ids=lambda value: errno.errorcode.get(value, str(value)),
)
def test_a_network_mount(
    code: int, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three operations fail, as on a mount whose server is away; a bad disk or a full one is not waited for."""
    storage = Storage.open(str(tmp_path))
    failures = iter([OSError(code, os.strerror(code))] * 3)
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if (error := next(failures, None)) is not None:
            raise error
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if passes:
        storage.write_json("x.json", {"a": 1})
        assert storage.read_json("x.json") == {"a": 1}
        assert len(caplog.records) == 2
    else:
        with pytest.raises(StorageError):
            storage.write_json("x.json", {"a": 1})
        assert len(list(failures)) == 2 and not caplog.records
    assert os.listdir(tmp_path) == (["x.json"] if passes else [])


def test_waits_grow_and_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = [0.0], []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)

    def fail() -> None:
        raise TransientStorageError("storage: away")

    with pytest.raises(TransientStorageError, match="away; this was tried for 5 min"):
        retry.retrying("place", 300.0, fail)
    assert sum(waits) == pytest.approx(300.0)
    limits = [min(0.5 * 2**n, 15.0) for n in range(len(waits))]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits[:-1], limits, strict=False))
    waits.clear()
    with pytest.raises(TransientStorageError, match=r"^storage: away$"):
        retry.retrying("place", 0.0, fail)
    assert not waits


def test_the_time_travels_with_the_storage(s3_uri: str) -> None:
    for path in (s3_uri, "/some/where"):
        child = Storage.open(path, 7.5).child("x")
        assert pickle.loads(pickle.dumps(child)).retry_for_s == 7.5


@pytest.mark.parametrize(
    "words",
    [
        "AWS Error ACCESS_DENIED during HeadObject operation: No response body.",
        "AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation",
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 60, SSL peer certificate was not OK",
        "Cannot parse URI",
    ],
)
def test_words_of_what_does_not_pass(words: str) -> None:
    assert not isinstance(explain(OSError(words), "read", "s3://b/x"), TransientStorageError)


def test_googles_store_is_left_to_the_same_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow by itself would try for a quarter of an hour, without a word."""
    seen: list[str] = []
    arrow = SimpleNamespace(FileSystem=SimpleNamespace(from_uri=seen.append))
    monkeypatch.setattr("raymem.storage.connect.pafs", arrow)
    for uri in ("gs://b/x", "gs://b/x?project_id=p", "gs://b/x?retry_limit_seconds=3"):
        connect(uri)
    assert seen == [
        "gs://b/x?retry_limit_seconds=10", "gs://b/x?project_id=p&retry_limit_seconds=10",
        "gs://b/x?retry_limit_seconds=3",
    ]  # fmt: skip


def test_work_that_nobody_wants_ends_before_the_next_chunk_change_and_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, unwanted = Storage.open(str(tmp_path / "storage")), threading.Event()
    monkeypatch.setattr("raymem.storage.connect.CHUNK_BYTES", 10)

    class Source:
        """A file of which two chunks are read, and then nobody wants its copy."""

        chunks = 0

        def open_input_stream(self, path: str, compression: None) -> Source:
            return self

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        def read(self, size: int) -> bytes:
            self.chunks += 1
            if self.chunks > 2:
                unwanted.set()
            return bytes(size)

    with retry.until(unwanted):
        storage.write_bytes("before", b"wanted")
        with pytest.raises(retry.Abandoned):
            copy_file(Source(), "file", storage.filesystem, str(tmp_path / "copy"))
        assert (tmp_path / "copy").stat().st_size == 20
        with pytest.raises(retry.Abandoned):
            storage.write_bytes("after", b"unwanted")
        with pytest.raises(retry.Abandoned):
            storage.delete_dir("before")
        assert storage.read_bytes("before") == b"wanted"
    assert not storage.exists("after")
    storage.write_bytes("after", b"another thread's, or later")

    tries: list[int] = []

    def away() -> None:
        tries.append(1)
        raise TransientStorageError("away")

    monkeypatch.setattr("raymem.storage.retry.time", SimpleNamespace(sleep=lambda s: None, monotonic=time.monotonic))
    with retry.until(unwanted), pytest.raises(retry.Abandoned):
        retry.retrying("place", 100.0, away)
    assert len(tries) == 1

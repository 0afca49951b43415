"""Cells are written only over what was read: in a directory, on S3 (moto) and on Google's store (a stand-in)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raymem.errors import StorageError, TransientStorageError
from raymem.storage import connect
from raymem.storage.leases.cells import Cell, Changed, FileCell, ObjectCell, Version
from raymem.storage.storage import Storage
from tests.helpers.faulty_proxy import proxy_before


class _Google(BaseHTTPRequestHandler):
    """One bucket of Google's XML interface: objects have generations, and writes may name the one they replace."""

    objects: dict[str, tuple[int, bytes]] = {}

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        generation = self.objects.get(self.path, (0, b""))[0]
        if self.headers.get("x-goog-if-generation-match", str(generation)) != str(generation):
            return self._answer(412)
        self.objects[self.path] = generation + 1, data
        return self._answer(200, generation + 1)

    def do_GET(self) -> None:
        if self.path not in self.objects:
            return self._answer(404)
        generation, data = self.objects[self.path]
        return self._answer(200, generation, data)

    def _answer(self, status: int, generation: int = 0, data: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{generation}"')
        self.send_header("x-goog-generation", str(generation))
        self.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def google_uri() -> Iterator[str]:
    _Google.objects = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Google)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"gs://anonymous@bucket/team%20a?endpoint_override=127.0.0.1:{server.server_port}&scheme=http"
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["s3", "gs"])
def cell(request: pytest.FixtureRequest, tmp_path: Path) -> Cell:
    uri = request.getfixturevalue("s3_uri" if request.param == "s3" else "google_uri")
    return ObjectCell(Storage.open(uri).child(tmp_path.name), "a/cell of mine")


def test_an_object_is_written_only_over_what_was_read(cell: Cell) -> None:
    assert cell.read() is None
    first = cell.write(b"first", None)
    assert first == cell.read()
    goes_on(cell, first)


def test_a_file_is_written_only_over_what_was_read_and_never_made(tmp_path: Path) -> None:
    cell = FileCell(tmp_path / "cell")
    for use in (cell.read, lambda: cell.write(b"", None)):
        with pytest.raises(StorageError, match=r"cannot read .*/cell: no such file or directory"):
            use()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cell").write_bytes(b"first, and longer than what comes")
    first = cell.read()
    assert first is not None
    goes_on(cell, first)


def goes_on(cell: Cell, first: Version) -> None:
    with pytest.raises(Changed):
        cell.write(b"another first", None)
    second = cell.write(b"second", first)
    with pytest.raises(Changed):
        cell.write(b"another second", first)
    assert second == cell.read() and second.data == b"second"
    cell.write(b"", second)
    now = cell.read()
    assert now is not None and now.data == b""


def test_a_write_whose_answer_was_lost_is_known_as_ones_own(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "TRIES", 2)
    with proxy_before(s3_uri) as proxy:
        cell = ObjectCell(Storage.open(proxy.uri(s3_uri)).child(tmp_path.name), "cell")
        first = cell.write(b"first", None)
        proxy.away("reset", at="cell", for_s=0.05)  # the store has done it, and its answer is cut
        second = cell.write(b"second", first)
        assert second == cell.read() and proxy.failed


def test_what_a_store_refuses_is_said(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "TRIES", 1)
    gone = ObjectCell(Storage.open(s3_uri.replace("raymem-test", "no-such-bucket")), "cell")
    for use in (gone.read, lambda: gone.write(b"x", None)):
        with pytest.raises(StorageError, match=r"NoSuchBucket: .*; create the bucket, or correct its name"):
            use()
    with proxy_before(s3_uri) as proxy:
        cell = ObjectCell(Storage.open(proxy.uri(s3_uri)), "cell")
        proxy.errors(status=403)
        with pytest.raises(StorageError, match=r"AccessDenied: Access Denied; check that the credentials"):
            cell.write(b"x", None)
        proxy.errors(status=500)
        with pytest.raises(TransientStorageError, match=r"InternalError.*; the object store is overloaded or broken"):
            cell.read()
        proxy.away("refuse")
        with pytest.raises(TransientStorageError, match=r"cannot read s3://.*; check the network and the endpoint"):
            cell.read()

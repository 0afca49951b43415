"""An HTTP proxy on loopback that fails as networks and object stores do, on command."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import math
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace, TracebackType
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import pytest

Absence = Literal["refuse", "reset", "hang"]

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "expect", "content-length"}
_ERRORS = {
    403: (403, "AccessDenied", "Access Denied"),
    404: (404, "NoSuchKey", "The specified key does not exist."),
    500: (500, "InternalError", "We encountered an internal error. Please try again."),
    503: (503, "SlowDown", "Please reduce your request rate."),
}


class FaultyProxy:
    """Stands before a server; passes requests on until it is told to fail. Its port stays its own while it is away.

    ::

        with FaultyProxy("127.0.0.1", 9000) as proxy:
            proxy.away()        # connections are refused, open ones are reset
            proxy.back()

    Args:
        host, port: the server.
        seed: of the requests that :meth:`errors` picks.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        self.requests = 0
        """Requests that arrived, those that failed included."""
        self.failed = 0
        """Requests that were answered by a fault."""
        self._server_address = (host, port)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._absence: Absence | None = None
        self._error: tuple[int, str, str] = _ERRORS[500]
        self._rate = self._delay_s = 0.0
        self._bytes_per_s, self._link_is_free_at = math.inf, 0.0
        self._later: tuple[str, Callable[[], None]] | None = None
        self._timer = threading.Timer(0, self.back)
        self._wake = threading.Event()
        # Bound and not listening: it keeps the port while nobody listens there.
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._holder.bind(("127.0.0.1", 0))
        self.port: int = self._holder.getsockname()[1]
        self._listener: _Listener | None = None
        self._listen()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """``127.0.0.1:port``."""
        return f"127.0.0.1:{self.port}"

    def uri(self, uri: str) -> str:
        """Return an ``s3://`` URI that names the server by this proxy."""
        host, port = self._server_address
        return uri.replace(f"endpoint_override={host}:{port}", f"endpoint_override={self.address}")

    def away(self, how: Absence = "refuse", *, at: str | None = None, for_s: float | None = None) -> None:
        """Be unreachable: refuse connections, reset each in the middle of its answer, or never answer.

        Args:
            at: the first request that names this is the first that fails.
            for_s: seconds until it is back by itself.
        """
        if at is not None:
            self._later = at, partial(self.away, how, for_s=for_s)
            return
        self._timer.cancel()
        if for_s is not None:
            self._timer = threading.Timer(for_s, self.back)
            self._timer.start()
        self._wake.clear()
        self._absence = how
        if how == "refuse":
            self._stop_listening()
            self._reset_connections()

    def back(self) -> None:
        """End every fault, also one that is still to come."""
        self._timer.cancel()
        self._later = None
        self._absence, self._rate, self._delay_s, self._bytes_per_s = None, 0.0, 0.0, math.inf
        self._wake.set()
        self._listen()

    def throttle(self, rate: float = 1.0) -> None:
        """Answer this share of the requests with ``503 SlowDown``."""
        self._error, self._rate = _ERRORS[503], rate

    def errors(self, rate: float = 1.0, status: int = 500) -> None:
        """Answer this share of the requests with an error: 403 and 404 are for good, 500 is not."""
        self._error, self._rate = _ERRORS[status], rate

    def slow(self, delay_s: float = 1.0, *, bytes_per_s: float = math.inf) -> None:
        """Be far away: wait before each answer, and let all bodies together through at a limited rate."""
        self._wake.clear()
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s

    def close(self) -> None:
        """Let the port go."""
        self.back()
        self._stop_listening()
        self._reset_connections()
        self._holder.close()

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = _Listener(self)
            threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown()
            listener.server_close()

    def _reset_connections(self) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            _reset(connection)

    def _answer(self, handler: _Handler) -> None:
        """Answer one request, or fail as was commanded."""
        body, begin = _body_of(handler), None
        with self._lock:
            self.requests += 1
            if self._later is not None and self._later[0] in handler.path:
                begin, self._later = self._later[1], None
        if begin is not None:
            begin()
        with self._lock:
            fails = self._random.random() < self._rate
            self.failed += fails or self._absence is not None
        if self._delay_s or self._bytes_per_s < math.inf:
            self._wake.wait(self._delay_s + self._transfer_s(len(body)))
        if self._absence == "hang":
            self._wake.wait()
            _reset(handler.connection)
            return
        status, headers, content = self._error_page() if fails else self._forward(handler, body)
        if self._bytes_per_s < math.inf and handler.command != "HEAD":
            self._wake.wait(self._transfer_s(len(content)))
        if self._absence is not None:
            if handler.command == "HEAD":  # whose answer has no middle
                _reset(handler.connection)
                return
            content = content[: len(content) // 2]
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)
        if self._absence is not None:
            _reset(handler.connection)

    def _transfer_s(self, size: int) -> float:
        """Return after how many seconds a body is through the link, behind those that came before it."""
        with self._lock:
            now = time.monotonic()
            self._link_is_free_at = max(now, self._link_is_free_at) + size / self._bytes_per_s
            return self._link_is_free_at - now

    def _error_page(self) -> tuple[int, list[tuple[str, str]], bytes]:
        status, code, message = self._error
        page = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
        return status, [("Content-Type", "application/xml"), ("Content-Length", str(len(page)))], page

    def _forward(self, handler: _Handler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(*self._server_address, timeout=60)
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP_BY_HOP}
        with contextlib.closing(upstream):
            upstream.request(handler.command, handler.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        length = answer.getheader("Content-Length", "0") if handler.command == "HEAD" else str(len(content))
        return answer.status, [*kept, ("Content-Length", length)], content


def proxy_before(s3_uri: str) -> FaultyProxy:
    """Return a proxy before the server that an ``s3://`` URI names."""
    host, _, port = dict(parse_qsl(urlsplit(s3_uri).query))["endpoint_override"].partition(":")
    return FaultyProxy(host, int(port))


def ends_when_noticed(proxy: FaultyProxy, patch: pytest.MonkeyPatch, *, after_s: float = 0.0) -> None:
    """End a fault some seconds after raymem waits for the second time because of it; its own waits take no time."""
    waits = itertools.count(1)

    def wait(seconds: float) -> None:
        if next(waits) % 2 == 0:
            time.sleep(after_s)
            proxy.back()

    patch.setattr("raymem.storage.retry.time", SimpleNamespace(sleep=wait, monotonic=time.monotonic))


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", proxy.port), _Handler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "127.0.0.1", self.proxy.port

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.proxy._lock:
            self.proxy._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.proxy._lock:
            self.proxy._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that broke are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def do(self) -> None:
        self.server.proxy._answer(self)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_OPTIONS = do

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""


def _body_of(handler: _Handler) -> bytes:
    """Read the body of a request, whose length may come before it or before each of its chunks."""
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    body = b""
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return body


def _reset(connection: socket.socket) -> None:
    """Close with RST in place of FIN."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        connection.close()

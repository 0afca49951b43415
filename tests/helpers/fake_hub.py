"""A Hugging Face hub on loopback, as far as pushing goes."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_of_the_tests"


class FakeHub:
    """What the hub holds: repositories that are made, and the files of each."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.licences = {"org/base": "apache-2.0"}
        self.refused: dict[str, int] = {}
        """Part of a path -> status with which requests to it are refused."""
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Return status and JSON."""
        for part, status in self.refused.items():
            if part in path:
                return status, {"error": "refused by the tests"}
        if method == "GET" and path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").partition("/revision/")[0]
            if name not in self.licences and name not in self.files:
                return 404, {"error": "Repository not found"}
            licence = self.licences.get(name)
            return 200, {"id": name, "sha": "0" * 40, "siblings": [], "cardData": {"license": licence}, "tags": []}
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            name = f"{owner}/{asked['name']}"
            if name in self.files:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.files[name], self.private[name] = (
                {},
                asked.get("private", False) or asked.get("visibility") == "private",
            )
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            files = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return 200, {"files": [{"path": file["path"], **how} for file in files]}
        name, _, action = path.removeprefix("/api/models/").partition("/commit/")
        if action:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.messages.append(line["value"]["summary"])
                elif line["key"] == "file":
                    self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
        return 404, {"error": f"the tests know no {method} {path}"}


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Yield a hub that answers at its ``url`` until the end of the block."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, value = hub.answer(self.command, self.path.partition("?")[0], body, token)
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def reached_hub(patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Yield a hub that this process talks to, with the right token."""
    from huggingface_hub import constants

    with fake_hub() as running:
        patch.setattr(constants, "ENDPOINT", running.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", TOKEN)
        yield running

"""An mlflow database with its tables already made (the migrations take seconds), and an mlflow server in a thread."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(scope="session")
def template_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of the installed mlflow without any run."""
    from raymem.tracking.client import connect

    path = tmp_path_factory.mktemp("mlflow") / "template.db"
    connect(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def storage(tmp_path: Path, template_db: Path) -> str:
    """A local storage path whose mlflow.db is ready."""
    root = tmp_path / "store"
    root.mkdir()
    shutil.copy(template_db, root / "mlflow.db")
    return str(root)


@pytest.fixture(autouse=True)
def _no_ambient_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


class Server:
    """mlflow's own REST application on a fixed loopback port, in a thread that can be stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._server: Any = None
        self.port = 0
        self.requests: list[str] = []
        self.status: int | None = None
        """Answer every request with this status instead."""

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        from mlflow.server import app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *args: Any, **kwargs: Any) -> None:
                pass

        def outer(environ: dict[str, Any], respond: Any) -> Any:
            self.requests.append(environ["PATH_INFO"])
            if self.status is not None:
                respond(f"{self.status} Refused", [("Content-Type", "text/plain")])
                return [b"refused"]
            return app(environ, respond)

        self._server = make_server("127.0.0.1", self.port, outer, threaded=True, request_handler=Quiet)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture(scope="module")
def server(template_db: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    shutil.copy(template_db, directory / "m.db")
    names = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{directory}/m.db",
        "_MLFLOW_SERVER_REGISTRY_STORE": f"sqlite:///{directory}/m.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(directory / "art"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    patch = pytest.MonkeyPatch()
    for name, value in names.items():
        patch.setenv(name, value)
    running = Server(directory)
    running.start()
    try:
        yield running
    finally:
        running.stop()
        patch.undo()

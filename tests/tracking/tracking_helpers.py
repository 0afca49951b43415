"""What the tracking tests share."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any


def recipe(**tracking: Any) -> dict[str, Any]:
    defaults = {"kind": "mlflow", "uri": None, "experiment": "exp", "register_as": None, "alias": "candidate"}
    return {
        "name": "run1",
        "model": {"name": "org/base", "revision": "abc123", "config": None},
        "train": {"steps": 30},
        "tracking": {**defaults, **tracking},
    }


class Server:
    """mlflow's own REST application on a fixed loopback port, in a thread that can be stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._server: Any = None
        # Holds the port while the server is stopped: werkzeug ends the process (SystemExit) where another took it.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port: int = self._reserved.getsockname()[1]
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
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def close(self) -> None:
        self.stop()
        self._reserved.close()

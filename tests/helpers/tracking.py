"""What the tracking tests share."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from raymem.tracking import RunStart, start_tracking
from raymem.tracking.mlflow.tracker import MlflowTracker
from raymem.tracking.tensorboard_tracker import _events


def recipe(**tracking: Any) -> dict[str, Any]:
    defaults = {"kind": "mlflow", "uri": None, "experiment": "exp", "register_as": None, "alias": "candidate"} | {
        "system_metrics": False
    }
    return {
        "name": "run1",
        "model": {"name": "org/base", "revision": "abc123", "config": None},
        "train": {"steps": 30},
        "tracking": {**defaults, **tracking},
    }


def start(storage: str, resume: bool = False, **changes: Any) -> MlflowTracker:
    """The tracker of a run; ``changes`` to its recipe, and to how it starts."""
    options = {
        k: changes.pop(k)
        for k in ("parent_run_id", "device", "tags", "source", "datasets", "point", "group")
        if k in changes
    }
    tracker = start_tracking(RunStart({**recipe(), **changes}, storage, resume, **options))
    assert isinstance(tracker, MlflowTracker)
    return tracker


def written(folder: Path) -> list[tuple[int, float]]:
    """Steps and values of the loss in all event files of a folder, oldest first."""
    return [
        (event.step, value.simple_value)
        for path in sorted(folder.glob("events*"))
        for event in _events(path)
        for value in event.summary.value
        if value.tag == "loss"
    ]


class Server:
    """mlflow's own REST application in a thread, on a loopback port of its own.

    ``up`` is its switch: while it is off, connections are closed unanswered. The port is never let go, because another
    process may then take it.
    """

    def __init__(self) -> None:
        self.up = True
        self.requests: list[str] = []
        self.status: int | None = None
        """Answer every request with this status instead."""
        self._server = self._make()
        self.uri = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def _make(self) -> Any:
        from mlflow.server import app
        from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

        class Quiet(WSGIRequestHandler):
            def log(self, *args: Any, **kwargs: Any) -> None:
                pass

        class Switched(ThreadedWSGIServer):
            def verify_request(_, *args: Any) -> bool:
                return self.up

        def outer(environ: dict[str, Any], respond: Any) -> Any:
            self.requests.append(environ["PATH_INFO"])
            if self.status is not None:
                respond(f"{self.status} Refused", [("Content-Type", "text/plain")])
                return [b"refused"]
            return app(environ, respond)

        return Switched("127.0.0.1", 0, outer, Quiet)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

"""Ray processes that tests start: found by free ports, ended by their process ids."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest


@dataclass(frozen=True)
class RayHead:
    """How to reach the head of this test session."""

    dashboard: str
    """http://127.0.0.1:port, for job submission."""
    gcs: str
    """127.0.0.1:port, for ``ray.init(address=)``."""
    token_path: Path
    home: Path
    pid: int

    def client_env(self) -> dict[str, str]:
        """Environment of a process that may use this cluster: nothing of the developer's own Ray settings."""
        return {
            **clean_environment(),
            "HOME": str(self.home),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_ADDRESS": self.gcs,
        }


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def free_ports(count: int) -> list[int]:
    """Ports that were free together a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


def wait_until_up(process: subprocess.Popen[bytes], head: RayHead, log: Path) -> None:
    request = urllib.request.Request(head.dashboard + "/api/jobs/")
    request.add_header("Authorization", f"Bearer {head.token_path.read_text()}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), opener.open(request, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"ray head did not start (exit code {process.poll()}):\n{log.read_text()[-4000:]}")


def end_session(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the head, and SIGKILL to whatever of its own descendants is left after that."""
    if process.poll() is not None:
        return
    ours = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    _, alive = psutil.wait_procs(ours, timeout=5)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil compares start times: never a recycled pid
            child.kill()
    if process.poll() is None:
        process.kill()
    process.wait(15)

"""Ray processes that tests start: found by free ports, ended by their process ids."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
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
    """Ports that are free now and that no one takes by chance before they are used.

    They lie above those of Ray's workers (10002 to 19999) and below those that Linux gives to outgoing connections.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32768), k=1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            break
    return found


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
    """SIGKILL to the head and all of its descendants; asked politely, Ray takes 20 seconds to the same end."""
    if process.poll() is not None:
        return
    head = psutil.Process(process.pid)
    ours = [head, *head.children(recursive=True)]
    for one in ours:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil compares start times: never a recycled pid
            one.kill()
    process.wait(15)
    psutil.wait_procs(ours, timeout=5)


def workers_of(head: RayHead) -> list[psutil.Process]:
    """Ray Train workers of this session's cluster only."""
    found = psutil.Process(head.pid).children(recursive=True)
    return [process for process in found if "RayTrainWorker" in " ".join(process.cmdline())]


class KillOnce(threading.Thread):
    """SIGKILL one worker as soon as a run has a checkpoint."""

    def __init__(self, head: RayHead, run: Path) -> None:
        super().__init__(daemon=True)
        self.head, self.run_directory = head, run
        self.killed: int | None = None

    def run(self) -> None:
        deadline = time.monotonic() + 200
        workers: list[psutil.Process] = []
        while time.monotonic() < deadline and self.killed is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                if not workers:  # looked for early and seldom: that takes longer than some steps
                    workers = workers_of(self.head)
                elif list(self.run_directory.glob("checkpoints/step_*/manifest.json")):
                    workers[-1].send_signal(signal.SIGKILL)
                    self.killed = workers[-1].pid
            time.sleep(0.01 if workers else 0.5)

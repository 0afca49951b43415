"""Ray processes that tests start: found by free ports, ended by their process ids."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

QUIET = {"RAY_enable_metrics_collection": "0", "RAY_event_stats": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""What the dashboard shows is not collected, and no actor waits for a cloud that takes this machine back."""


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


@contextlib.contextmanager
def running_head(**environment: str) -> Iterator[RayHead]:
    """``ray start --head --block`` in a session (setsid) of its own.

    Never ``ray stop``: that would end every Ray of this machine, those of other people's tests included.

    Args:
        environment: Of the head, and so of every job.
    """
    home = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))  # short: it holds unix sockets, with a limit of 107 bytes
    token_path = home / "token"
    token_path.touch(mode=0o600)
    token_path.write_text("test-" + os.urandom(16).hex())
    gcs, dashboard, client, agent = free_ports(4)
    head = RayHead(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", token_path, home, 0)
    ours = {k: v for k, v in head.client_env().items() if k != "RAY_API_SERVER_ADDRESS"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # jobs say `python`
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={gcs}", "--num-cpus=2"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={home}/r", "--object-store-memory=200000000"]
    with open(home / "head.log", "wb") as log:
        process = subprocess.Popen(
            command, env={**ours, **QUIET, "PATH": path, **environment}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_up(process, head, home / "head.log")
        yield RayHead(head.dashboard, head.gcs, token_path, home, process.pid)
    finally:
        end_session(process)
        shutil.rmtree(home, ignore_errors=True)


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
    """SIGKILL, or another signal, to one worker as soon as a run has a checkpoint."""

    def __init__(self, head: RayHead, run: Path, sent: signal.Signals = signal.SIGKILL) -> None:
        super().__init__(daemon=True)
        self.head, self.run_directory, self.sent = head, run, sent
        self.killed: int | None = None

    def run(self) -> None:
        deadline = time.monotonic() + 200
        workers: list[psutil.Process] = []
        while time.monotonic() < deadline and self.killed is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                if not workers:  # looked for early and seldom: that takes longer than some steps
                    workers = workers_of(self.head)
                elif list(self.run_directory.glob("checkpoints/step_*/manifest.json")):
                    workers[-1].send_signal(self.sent)
                    self.killed = workers[-1].pid
            time.sleep(0.01 if workers else 0.5)

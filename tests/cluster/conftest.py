"""A real Ray head with token authentication, on free loopback ports, that ends with the test session."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from ray_processes import RayHead, end_session, free_ports, wait_until_up

QUIET = {"RAY_enable_metrics_collection": "0", "RAY_event_stats": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""What the dashboard shows is not collected, and no actor waits for a cloud that takes this machine back."""


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


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """The head of this test session."""
    with running_head() as head:
        yield head


@pytest.fixture
def login(ray_head: RayHead) -> Iterator[Callable[..., None]]:
    """Set Ray's authentication in this process; Ray reads it once, so it must be told to read it again."""
    from ray._raylet import AuthenticationTokenLoader, Config

    def read_again() -> None:
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    with pytest.MonkeyPatch.context() as patch:

        def login(mode: str = "token", token_path: Path | None = ray_head.token_path) -> None:
            for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
                patch.delenv(name, raising=False)
            patch.setenv("RAY_AUTH_MODE", mode)
            patch.setenv("HOME", str(ray_head.home))
            if token_path:
                patch.setenv("RAY_AUTH_TOKEN_PATH", str(token_path))
            read_again()

        yield login
    read_again()


@pytest.fixture(scope="module")
def cluster(ray_head: RayHead) -> Iterator[RayHead]:
    """This process as a driver of the session's cluster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what a worker with one CPU has
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_head.client_env().items():
            patch.setenv(name, value)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        from ray._raylet import AuthenticationTokenLoader, Config

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        ray.init(address=ray_head.gcs, log_to_driver=False, logging_level="ERROR")
        yield ray_head
        ray.shutdown()
    torch.set_num_threads(threads)

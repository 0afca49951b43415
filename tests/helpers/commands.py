"""Commands in processes forked from a server that has imported everything: what a fresh one does, seconds sooner."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from raymem.cli.main import run_app
from tests.helpers.support import in_processes


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``raymem ARGUMENTS`` in this process, which ends with it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_app(*arguments)
    return subprocess.CompletedProcess(
        [str(argument) for argument in arguments], status, out.getvalue(), err.getvalue()
    )


def kill_command(*arguments: object, checkpoints: Path, folder: Path) -> None:
    """``raymem ARGUMENTS`` in a process of its own; SIGKILL as soon as there is a whole checkpoint."""
    with pytest.raises(AssertionError, match="a process died"):  # else it was over before that
        in_processes(_be_killed, 0, folder, [str(a) for a in arguments], checkpoints)


def _be_killed(command: list[str], checkpoints: Path) -> None:
    def kill() -> None:
        while not list(checkpoints.glob("step_*/manifest.json")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    run_app(*command)

"""Commands in processes forked from a server that has imported everything: what a fresh one does, seconds sooner."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import types
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


def run_program(folder: Path, name: str) -> str:
    """``python NAME`` in a folder, in this process, which ends with it; returns what it prints."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    # What looks for a program's classes by name, as pickle does, finds them where a program has them.
    sys.modules["__main__"] = program = types.ModuleType("__main__")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile((folder / name).read_text(), name, "exec"), program.__dict__)
    return out.getvalue()


def run_command_with(packages: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``raymem ARGUMENTS`` in this process, which ends with it, where ``packages`` is one more site-packages."""
    sys.path.insert(0, str(packages))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    return run_command(*arguments)


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

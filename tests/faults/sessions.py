"""A ``raymem`` command in a process that is forked from a server, and that stops to wait at a chosen moment."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = "tests.faults.preloaded"
"""What the server imports that forks sessions."""
MARK = "RAYMEM_FAULTS_ROUND"
"""Environment variable that tells which round a process belongs to."""
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "os.truncate"}


@dataclass(frozen=True)
class Moment:
    """A point in a session."""

    kind: str
    """``step``: before the n-th step; ``file``: before the n-th use of a file in the round's folder, both in the
    session's own process; ``checkpoint``: ``delay_s`` after that step's checkpoint has appeared."""
    number: int
    delay_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.number}" + (f" + {self.delay_s:.2f} s" if self.delay_s else "")


@dataclass(frozen=True)
class Spec:
    """What a session does."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    folder: Path
    """The round's folder."""
    moment: Moment | None = None
    """Of kind ``step`` or ``file``: there the session waits until it is released."""
    shims: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Functions of :mod:`tests.faults.shims` with their options, called before the command begins."""
    uid: int | None = None


@dataclass
class Session:
    """A started command."""

    spec: Spec
    steps_done: int | None = None
    """Steps that were taken up to the moment, in this session."""
    file_uses: int = 0
    """Uses of files in the whole session; 0 until it has ended of its own accord."""
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=run_session, args=(self.spec, theirs))
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def is_over(self) -> bool:
        return self.process.exitcode is not None

    def reaches_moment(self, timeout_s: float) -> bool:
        """Wait for the session's moment; False if it ends without one."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(EOFError, ConnectionError):
                if self.pipe.poll(0.05):
                    return self._take(self.pipe.recv())
            if self.is_over:
                return False
        return False

    def release(self) -> None:
        """Let the session go on from its moment."""
        with contextlib.suppress(OSError):
            self.pipe.send("go on")

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; False if it has not come in time."""
        deadline = time.monotonic() + timeout_s
        while not self.is_over and time.monotonic() < deadline:
            self.process.join(0.1)
            with contextlib.suppress(EOFError, OSError):
                if self.pipe.poll():
                    self._take(self.pipe.recv())
        if self.is_over and self.ended is None:
            self.ended = time.monotonic()
        return self.is_over

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal."""
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.spec.log.read_text(errors="replace") if self.spec.log.exists() else ""

    def _take(self, message: tuple[str, int]) -> bool:
        what, number = message
        if what == "reached":
            self.steps_done = number
            return True
        self.file_uses = number
        return False


class _Halt:
    """Counts steps and uses of files in a session, and waits at its moment."""

    def __init__(self, spec: Spec, pipe: Connection) -> None:
        self.moment, self.pipe = spec.moment, pipe
        self.folder = str(spec.folder)
        self.log = str(spec.log)
        self.counts = {"step": 0, "file": 0}
        self.steps_done = 0
        self.is_waiting = False

    def install(self) -> None:
        loop: Any = importlib.import_module("raymem.training.loop")

        original = loop.train_step

        def train_step(*arguments: Any, **options: Any) -> Any:
            self.note("step")
            result = original(*arguments, **options)
            self.steps_done += 1
            return result

        loop.train_step = train_step
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or self.is_waiting or not arguments:
            return
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder):
            self.note("file")

    def note(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.moment is not None and self.moment.kind == kind and self.counts[kind] == self.moment.number:
            self.is_waiting = True
            self.pipe.send(("reached", self.steps_done))
            self.pipe.recv()
            self.is_waiting = False


def run_session(spec: Spec, pipe: Connection) -> None:
    """Run the command and end this process as the ``raymem`` script would. Called in the forked process."""
    status = 1
    try:
        _become(spec)
        halt = _Halt(spec, pipe)
        halt.install()
        from tests.faults import shims

        for name, options in spec.shims:
            getattr(shims, name)(**options)
        status = _call_main(spec.arguments)
        with contextlib.suppress(OSError):
            pipe.send(("uses", halt.counts["file"]))
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _become(spec: Spec) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    if spec.uid is not None:
        from tests.helpers import users

        users.open_way(Path(sys.base_prefix))
        users.become(users.User(spec.uid, 0o022, Path(f"/tmp/raymem-faults-home-{spec.uid}")))
    os.environ.update(spec.environment)
    os.chdir(spec.folder)
    tempfile.tempdir = None
    if "RAY_ADDRESS" in spec.environment:
        from tests.helpers.ray_fixtures import read_authentication_again

        read_authentication_again()
    import torch

    torch.set_num_threads(1)


def _call_main(arguments: Sequence[str]) -> int:
    from raymem.cli.main import main

    sys.argv = ["raymem", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0

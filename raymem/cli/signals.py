"""Lets signals end a command: tracked runs are ended, one sentence is said, the exit status is 128 + number."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from raymem import stopping
from raymem.cli import console

_SAME_S = 1.0
"""Seconds in which a second Ctrl-C is the first one again, as from a parent that passes on what we got ourselves."""
_LATE_S = 10.0
"""Seconds for what libraries do at exit; a cluster that a signal has ended as well would not answer them."""


class _Ending:
    """What has ended this command, if anything has. Exceptions do not say: Ray replaces those raised in its waits."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = 0.0
        self.saved_step: int | None = None
        """The step that a run has saved before its end."""
        self.cure = ""
        """The rest of the sentence, where the command can go on."""
        self.said = False


_ending = _Ending()


def unwind_on_signals() -> None:
    """End the command on SIGINT (Ctrl-C), SIGTERM (``ray job stop``, Kubernetes) and SIGHUP (a closed terminal).

    A run that takes steps saves the one that it is at before SIGTERM ends it; a second SIGTERM ends it at once.

    A signal that is ignored already, as SIGHUP under nohup, stays so. Nothing has ended the command yet.
    """
    global _ending
    _ending = _Ending()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGTERM and _ending.number is None and stopping.ask():
        return
    if _ending.number is None:
        _ending.number, _ending.since = number, time.monotonic()
        sys.exit(128 + number)
    if number == signal.SIGINT and time.monotonic() - _ending.since > _SAME_S:
        _leave()
    # Any other would only interrupt the ending.


def _leave() -> None:
    """End at once: nobody waits for what is being ended properly, but nothing of it is left running."""
    say(_ending.cure)
    with contextlib.suppress(OSError):
        console.out.show_cursor()
    _end(_own_cluster(), status())


def _own_cluster() -> Any:
    """Return the module that has started a cluster for this command, or None."""
    local = sys.modules.get("raymem.cluster.local")
    return local if local is not None and local.has_own() else None


def _end(cluster: Any, code: int) -> NoReturn:
    """Kill the cluster of this command, if it has one, and end its process."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if cluster is not None:
        with open(os.devnull, "w") as nowhere:  # everything is said, and Ray's threads here would tell of the killing
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        cluster.end_at_once()
    os._exit(code)  # the interpreter would wait for threads of Ray


def status() -> int:
    """Return the exit status of a command that a signal has ended."""
    return 128 + (_ending.number or signal.SIGINT)


@contextlib.contextmanager
def goes_on(cure: str) -> Iterator[None]:
    """Say how a command that a signal ends in the block goes on.

    Args:
        cure: the rest of a sentence.
    """
    _ending.cure = cure
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, stopping.Stopped):
            _ending.number, _ending.saved_step = signal.SIGTERM, stop.step
        if _ending.number is None and isinstance(stop, SystemExit):
            raise
        say(cure)
        raise SystemExit(status()) from None


def end(stop: SystemExit) -> int:
    """Return the exit status of a command that ends with ``stop``, and say what ended it if nobody did."""
    if _ending.number is None:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    say(_ending.cure)
    return status()


def leave(code: int) -> NoReturn:
    """End this process with an exit status.

    Where a signal has ended a command with a cluster of its own, that is killed instead of being asked to end, which
    takes seconds, and a minute if the signal has reached it too.
    """
    cluster = None if _ending.number is None else _own_cluster()
    if cluster is None:
        sys.exit(code)
    cluster.leave_to_caller()
    late = threading.Timer(_LATE_S, _end, (cluster, code))
    late.daemon = True
    late.start()
    atexit._run_exitfuncs()  # of which Ray Tune's asks the cluster
    late.cancel()
    _end(cluster, code)


def say(cure: str) -> None:
    """Say once what ended the command, and how it goes on."""
    if _ending.said:
        return
    _ending.said = True
    number = _ending.number or signal.SIGINT
    word = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    if _ending.saved_step is not None:
        word += f" once step {_ending.saved_step} was saved"
    with contextlib.suppress(OSError):  # the terminal may be gone
        console.err.print(f"{word}; {cure}" if cure else word)

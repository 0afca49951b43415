"""Lets signals end a command as Ctrl-C does: tracked runs are ended, a sentence is said, the status is 128 + number."""

from __future__ import annotations

import contextlib
import signal
import sys
from types import FrameType

from raymem.cli import console

_received: list[int] = []
"""Signals that end the command. Their exceptions do not say: Ray replaces those that are raised while it waits."""


def unwind_on_signals() -> None:
    """End the command on SIGTERM (``ray job stop``, Kubernetes) and SIGHUP (a closed terminal; not under nohup)."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # the same again would interrupt the ending
    _received.append(number)
    sys.exit(128 + number)


def say_and_exit(stop: KeyboardInterrupt | SystemExit, cure: str) -> BaseException:
    """Say what ended the command and how it goes on; returns what the command is to raise.

    Args:
        cure: the rest of a sentence.
    """
    if not _received and isinstance(stop, SystemExit):
        return stop
    number = _received[-1] if _received else signal.SIGINT
    word = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    with contextlib.suppress(OSError):  # the terminal may be gone
        console.err.print(f"{word}; {cure}")
    return SystemExit(128 + number)

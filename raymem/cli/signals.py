"""Lets signals end a command as Ctrl-C does: tracked runs are ended, a sentence is said, the status is 128 + number."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType

from raymem.cli import console


class Stopped(SystemExit):
    """A signal that ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def unwind_on_signals() -> None:
    """Raise Stopped on SIGTERM (``ray job stop``, Kubernetes) and SIGHUP (a closed terminal; not under nohup)."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # the same again would interrupt the ending
    raise Stopped(number)


def say_and_exit(stop: KeyboardInterrupt | Stopped, cure: str) -> SystemExit:
    """Say what ended the command and how it goes on; returns what the command is to raise.

    Args:
        cure: the rest of a sentence.
    """
    number = getattr(stop, "number", signal.SIGINT)
    word = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    with contextlib.suppress(OSError):  # the terminal may be gone
        console.err.print(f"{word}; {cure}")
    return SystemExit(128 + number)

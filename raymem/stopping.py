"""Lets a run end between two steps, with all of them saved, when its process is asked to end.

A signal's handler asks; the loop of this process, or of the workers that it drives, hears it at its next step boundary.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Stopped(SystemExit):
    """Ends a run that was asked to end and has saved its last step; the same command goes on from there."""

    def __init__(self, step: int) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.step = step


class _Requests:
    def __init__(self) -> None:
        self.listening = 0
        self.asked = False


_requests = _Requests()


def ask() -> bool:
    """Ask whatever runs in this process to save and end. False if nothing would hear it, or was asked before."""
    if not _requests.listening or _requests.asked:
        return False
    _requests.asked = True
    return True


def asked() -> bool:
    """Return whether that was asked."""
    return _requests.asked


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Say that steps are taken in the block, after which requests are looked for."""
    _requests.listening += 1
    try:
        yield
    finally:
        _requests.listening -= 1
        if not _requests.listening:
            _requests.asked = False

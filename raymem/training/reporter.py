"""Takes the loop's metrics. The loop knows this protocol only; who listens is the caller's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

Row = dict[str, float]
"""One step's metrics: ``step`` (steps done, from 1), ``loss``, ``lr``, ``grad_norm``, ``tokens_per_s``, ``elapsed_s``
(of all sessions, from where each one's loop was set up), ``epoch``, and when due
``eval_loss``, ``eval_perplexity``, ``eval_loss/<name>`` of named evaluation data, ``peak_bytes``, and with it
``held_bytes/<term>``: what rank 0 keeps on its device between steps, for the terms weights, trainable and optimizer."""

Listener = Callable[[Sequence[Row]], None]


class Reporter(Protocol):
    """Receives one row per step on every rank, in order."""

    def log(self, row: Row) -> None:
        """Take a row; it must be cheap, since it is called between steps."""

    def flush(self) -> None:
        """Deliver everything; called at checkpoints and at the end, on every rank."""

    def progress(self, what: str, *, brief: bool = True) -> None:
        """Learn what this rank does from now on; it must be cheap, since each step and evaluated batch calls it.

        Args:
            what: for people, such as ``step 12``.
            brief: whether it must be over within ``scaling.hang_timeout``.
        """


class LocalReporter:
    """Hands rows to listeners in this process, at once: a progress display, a tracking sink."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def log(self, row: Row) -> None:
        for listener in self._listeners:
            listener([row])

    def flush(self) -> None:
        pass

    def progress(self, what: str, *, brief: bool = True) -> None:
        pass

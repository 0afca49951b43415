"""Processes that take turns: each is stopped while it is not asked, so that what they take can be compared."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


class Contestant:
    """A process of a benchmark that reads a line of JSON and answers with one; its first line comes unasked.

    Args:
        command: the script and its arguments.
        environment: of the process.
    """

    def __init__(self, *command: str, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command], env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts: Any = self._answer()

    def ask(self, question: Any) -> Any:
        """Return the answer to a question."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended with status {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)


def in_turns(contestants: Mapping[str, Contestant], question: Any, rounds: int) -> dict[str, list[float]]:
    """Ask each in every round, in another order each time; the medians of what they answer, round by round."""
    names = list(contestants)
    medians: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            medians[name].append(statistics.median(contestants[name].ask(question)))
    return medians


def spread(values: list[float]) -> dict[str, float]:
    """Return least, median and largest value."""
    figures = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 4) for name, value in figures.items()}

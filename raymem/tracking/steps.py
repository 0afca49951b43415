"""Lets each step of a metric through once: rows are passed again after crashes and at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class NewSteps:
    """Remembers the highest step of each metric.

    Args:
        highest: metric -> the highest step that was recorded before.
        below: of a metric that is not in ``highest``, steps below it were recorded.
    """

    def __init__(self, highest: Mapping[str, int] | None = None, below: int | None = None) -> None:
        self._highest = dict(highest or {})
        self._least = -1 if below is None else below - 1

    def of(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, float]]]:
        """Return step and new numbers of each row that has some."""
        for row in rows:
            step = int(row["step"])
            numbers = {
                name: float(value)
                for name, value in row.items()
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
                if step > self._highest.get(name, self._least)
            }
            if numbers:
                self._highest |= dict.fromkeys(numbers, step)
                yield step, numbers

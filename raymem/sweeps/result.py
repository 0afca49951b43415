"""Defines the result of a sweep; light to import, since the public API names it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymem.sweeps.report import SweepRow
    from raymem.tracking import TrackingResult


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep."""

    folder: str
    """Path or URI of the directory of report, journal and best recipe."""
    report: str
    """Path or URI of the report in it."""
    best: str | None
    """Path or URI of the best trial's recipe, ready to train; None if no trial finished."""
    table: str
    """The Pareto front as a table of Markdown."""
    rows: list[SweepRow]
    """Every proposal that was judged."""
    gave_up: str | None
    """The reason why the sweep ended before all samples, if it did."""
    tracking: TrackingResult
    """The sweep's own run in the tracking system."""

    @property
    def run_id(self) -> str | None:
        """Id of the run in the tracking system, whose children are the trials."""
        return self.tracking.run_id

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Return the rows as plain values."""
        return [dataclasses.asdict(row) for row in self.rows]

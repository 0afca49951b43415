"""Reads what a sweep left in its directory, as plain values for its page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from raymem.errors import StorageError
from raymem.report.facts import MOST_RUNS, RunFacts, read_run
from raymem.report.find import SWEEP, Place, is_run
from raymem.sweeps.options import METRICS, is_score, trial_name
from raymem.sweeps.report import STATUSES, SweepRow, finished, pareto

_ROWS = "report/trials.json"
_BEST = "report/best.yaml"


@dataclass(frozen=True)
class SweepFacts:
    """A sweep, as its report has it."""

    name: str
    place: str
    budget_bytes: int
    objective: list[str]
    space: dict[str, Any]
    quality: str
    """The metric that is shown against memory."""
    rows: list[SweepRow]
    front: list[SweepRow]
    """The finished trials that no other one beats in quality and memory, from the least memory on."""
    runs: list[tuple[SweepRow, RunFacts]]
    """The runs of the trials on the front, the first few, as far as they are still there."""
    best: str | None
    """Recipe of the best trial, as YAML."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of proposals by status."""
        counts = Counter(row.status for row in self.rows)
        return {status: counts[status] for status in STATUSES if counts[status]}

    @property
    def done(self) -> list[SweepRow]:
        """The finished trials that can be drawn."""
        return finished(self.rows, (self.quality, "peak_bytes"))


def read_sweep(place: Place) -> SweepFacts:
    """Read a sweep.

    Raises:
        StorageError: it has no report yet, or a file cannot be read.
    """
    folder = place.directory
    facts = folder.read_record(SWEEP, {"budget": (int,), "objective": (list,), "space": (dict,), "key": (str,)})
    if not folder.exists(_ROWS):
        raise StorageError(
            f"{folder.join(_ROWS)}: the sweep has no report yet, which is written when it ends or is stopped; wait "
            "for it, or stop it: the same command goes on"
        )
    raw = folder.read_json(_ROWS)
    try:
        rows = [SweepRow(**{each.name: row[each.name] for each in fields(SweepRow)}) for row in raw]
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{folder.join(_ROWS)}: not as this version of raymem writes it ({error}); run the sweep's command "
            "again, which writes its report anew"
        ) from None
    known = (name for name in facts["objective"] if (name in METRICS or is_score(name)) and name != "peak_bytes")
    wanted = [*known, "eval_loss", "loss"]
    quality = next((name for name in wanted if finished(rows, (name, "peak_bytes"))), wanted[0])
    front = sorted(pareto(rows, (quality, "peak_bytes")), key=lambda row: row.metrics["peak_bytes"])
    best = folder.read_bytes(_BEST).decode() if folder.exists(_BEST) else None
    return SweepFacts(
        place.name,
        folder.path,
        facts["budget"],
        facts["objective"],
        facts["space"],
        quality,
        rows,
        front,
        _runs_of(place, facts["key"], front[:MOST_RUNS]),
        best,
    )


def _runs_of(place: Place, key: str, front: list[SweepRow]) -> list[tuple[SweepRow, RunFacts]]:
    found = []
    for row in front:
        name = trial_name(place.name, key, row.number)
        directory = place.beside(name)
        if is_run(directory):
            found.append((row, read_run(Place(directory, name, is_sweep=False))))
    return found

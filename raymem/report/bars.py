"""Works out the bars of memory: predicted and measured, by term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raymem.memory.budget import bytes_text
from raymem.memory.trace import CATEGORIES
from raymem.report.facts import RunFacts

REST = "rest of the step"
"""What a step takes beyond that which is kept between steps; a run measures the sum of it."""
UNDIVIDED = "not divided"
"""The measured peak of a run that does not say what is kept between steps."""
WIDTH = 560.0
_BAR, _PITCH, _TOP = 20.0, 46.0, 20.0
_LEAST_WIDTH = 46.0
"""Width from which a part has room for its name."""


@dataclass(frozen=True)
class Segment:
    """A part of a bar."""

    term: str
    num_bytes: int
    x: float
    width: float

    @property
    def words(self) -> str:
        """The part in words."""
        return f"{self.term}: {bytes_text(self.num_bytes)}"


@dataclass(frozen=True)
class Bar:
    """A bar, with the place of its upper edge."""

    label: str
    total: str
    y: float
    segments: list[Segment]


@dataclass(frozen=True)
class Bars:
    """All bars, on one scale."""

    width: float
    height: float
    bar_height: float
    bars: list[Bar]
    terms: list[str]
    """The terms that occur, for the legend."""
    description: str


@dataclass(frozen=True)
class MemoryRow:
    """A term of one run in the table."""

    term: str
    predicted: str
    measured: str


def draw_bars(runs: Sequence[RunFacts], labels: Sequence[str]) -> Bars | None:
    """Draw a predicted and a measured bar of every run; None if there is neither."""
    parts: list[tuple[str, dict[str, int]]] = []
    for run, label in zip(runs, labels, strict=True):
        before = f"{label}, " if len(runs) > 1 else ""
        if run.plan is not None:
            parts.append((f"{before}predicted", {term: size for term, size in run.plan.terms.items() if size}))
        if run.peak_bytes is not None:
            parts.append((f"{before}measured", measured(run)))
    if not parts:
        return None
    scale = WIDTH / max(max(sum(part.values()) for _, part in parts), 1)
    bars = []
    for index, (label, part) in enumerate(parts):
        x, segments = 0.0, []
        for term, size in part.items():
            segments.append(Segment(term, size, round(x, 1), round(size * scale, 1)))
            x += size * scale
        bars.append(Bar(label, bytes_text(sum(part.values())), _TOP + index * _PITCH, segments))
    shown = {term for _, part in parts for term in part}
    words = "; ".join(f"{bar.label} {bar.total} ({', '.join(s.words for s in bar.segments)})" for bar in bars)
    terms = [term for term in (*CATEGORIES, REST, UNDIVIDED) if term in shown]
    return Bars(WIDTH, _TOP + len(bars) * _PITCH - (_PITCH - _BAR) + 2, _BAR, bars, terms, words)


def measured(run: RunFacts) -> dict[str, int]:
    """Return the measured peak of a run by term, as far as it is known."""
    peak = run.peak_bytes or 0
    held: dict[str, int] = {term: run.held[term] for term in CATEGORIES if run.held.get(term)}
    if not held or sum(held.values()) > peak:
        return {UNDIVIDED: peak}
    return {**held, REST: peak - sum(held.values())}


def memory_table(run: RunFacts) -> list[MemoryRow]:
    """Return the rows of a run's table, its sums last."""
    found = measured(run) if run.peak_bytes is not None else {}
    planned = run.plan.terms if run.plan is not None else {}
    of_step = [term for term in CATEGORIES if term not in found]
    rows = []
    for term in CATEGORIES:
        size = f"{bytes_text(found[term])}" if term in found else ""
        rows.append(MemoryRow(term, bytes_text(planned[term]) if planned else "", size))
    if REST in found:
        together = bytes_text(sum(planned[term] for term in of_step)) if planned else ""
        rows.append(MemoryRow(f"{' + '.join(of_step)}", together, bytes_text(found[REST])))
    sums = bytes_text(sum(planned.values())) if planned else ""
    rows.append(MemoryRow("sum", sums, bytes_text(run.peak_bytes) if run.peak_bytes is not None else ""))
    return rows

"""Works out the picture of a sweep: quality against memory, with the Pareto front."""

from __future__ import annotations

from dataclasses import dataclass

from raymem.memory.budget import bytes_text
from raymem.report.curves import title_of
from raymem.report.drawing import Axis, Frame, axis, value_text
from raymem.report.sweep_facts import SweepFacts
from raymem.sweeps.report import SweepRow, point_text

FRAME = Frame(width=600, height=340, left=58, right=18, top=36, bottom=46)
_BEYOND, _MARGIN = 1.6, 0.06
"""Times the budget up to which refused proposals are drawn, and the space around the marks as a share of the axis."""


@dataclass(frozen=True)
class Dot:
    """A finished trial."""

    number: int
    x: float
    y: float
    on_front: bool
    words: str


@dataclass(frozen=True)
class Refused:
    """A proposal that was not started."""

    x: float
    words: str


@dataclass(frozen=True)
class FrontChart:
    """The picture."""

    frame: Frame
    x: Axis
    y: Axis
    x_label: str
    y_label: str
    dots: list[Dot]
    path: str
    """The stairs of the front."""
    budget_x: float | None
    refused: list[Refused]
    beyond: int
    """The refused proposals that would need more than the picture shows."""
    description: str


def draw_front(sweep: SweepFacts) -> FrontChart | None:
    """Draw the front; None if no trial finished."""
    if not sweep.done:
        return None
    unit, name = next(
        (size, name) for size, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))
        if sweep.budget_bytes >= size
    )  # fmt: skip
    refused = [row for row in sweep.rows if row.status == "refused" and row.predicted_bytes]
    near = [row for row in refused if (row.predicted_bytes or 0) <= _BEYOND * sweep.budget_bytes]
    sizes = [row.metrics["peak_bytes"] for row in sweep.done]
    in_view = sweep.budget_bytes <= 4 * max(sizes) or bool(near)
    limits = [*sizes, *(row.predicted_bytes or 0 for row in near), *([sweep.budget_bytes] if in_view else [])]
    x = axis(_with_margin([size / unit for size in limits]), FRAME.left, FRAME.width - FRAME.right, count=7)
    y = axis(_with_margin([row.metrics[sweep.quality] for row in sweep.done]), FRAME.height - FRAME.bottom, FRAME.top)
    on_front = {row.number for row in sweep.front}
    dots = [
        Dot(
            row.number, x.place(row.metrics["peak_bytes"] / unit), y.place(row.metrics[sweep.quality]),
            row.number in on_front, words(sweep, row, on_front=row.number in on_front),
        )
        for row in sorted(sweep.done, key=lambda row: row.metrics["peak_bytes"])
    ]  # fmt: skip
    title, of = title_of(sweep.quality)
    best = ", ".join(f"trial {row.number}" for row in sweep.front)
    return FrontChart(
        FRAME, x, y, f"Measured peak of a worker ({name})", f"{title} ({of})" if of else title, dots,
        _stairs([dot for dot in dots if dot.on_front]), x.place(sweep.budget_bytes / unit) if in_view else None,
        [Refused(x.place((row.predicted_bytes or 0) / unit), refused_words(row)) for row in near],
        len(refused) - len(near),
        f"{len(dots)} finished trials; on the Pareto front of {title.lower()} and memory: {best}.",
    )  # fmt: skip


def words(sweep: SweepFacts, row: SweepRow, *, on_front: bool) -> str:
    """Describe a trial in words."""
    place = "on the Pareto front" if on_front else "finished"
    values = f"{title_of(sweep.quality)[0].lower()} {value_text(row.metrics[sweep.quality])}"
    return (
        f"Trial {row.number}, {place}: {values}, peak {bytes_text(row.metrics['peak_bytes'])}. {point_text(row.point)}"
    )


def refused_words(row: SweepRow) -> str:
    """Describe a refused proposal in words."""
    needs = f": needs at least {bytes_text(row.predicted_bytes)}" if row.predicted_bytes else ""
    return f"Proposal {row.number}, refused{needs}. {point_text(row.point)}"


def _with_margin(values: list[float]) -> list[float]:
    """Return the ends of an axis on which no mark lies at the edge; none is below zero where no value is."""
    low, high = min(values), max(values)
    margin = _MARGIN * (high - low)
    return [max(low - margin, min(0.0, low)), high + margin]


def _stairs(dots: list[Dot]) -> str:
    if not dots:
        return ""
    path = f"M{dots[0].x:g} {dots[0].y:g}"
    for dot in dots[1:]:
        path += f"H{dot.x:g}V{dot.y:g}"
    return path

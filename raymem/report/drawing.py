"""Works out pictures as numbers: axes, paths, markers and bars, which the templates write as SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from raymem.report.curves import Chart, Point, Series

MARKERS = (
    "M-3.2 0A3.2 3.2 0 1 1 3.2 0A3.2 3.2 0 1 1-3.2 0Z",  # circle
    "M-3-3H3V3H-3Z",  # square
    "M0-3.8L3.6 2.8H-3.6Z",  # triangle
    "M0-4.2L3.6 0L0 4.2L-3.6 0Z",  # diamond
    "M-3-3L3 3M-3 3L3-3",  # cross
    "M0-4V4M-4 0H4",  # plus
    "M0 3.8L3.6-2.8H-3.6Z",  # triangle that points down
    "M-3.6-2H3.6M-3.6 2H3.6",  # two bars
)
"""The path of each style's marker, around the origin; styles differ in it and in their dashes, not in colour alone."""
_PER_CURVE = 7


@dataclass(frozen=True)
class Frame:
    """The size of a picture and the margins of its axes, in SVG units."""

    width: float = 420.0
    height: float = 236.0
    left: float = 50.0
    right: float = 14.0
    top: float = 12.0
    bottom: float = 34.0


@dataclass(frozen=True)
class Tick:
    """A labelled place of an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A linear axis."""

    low: float
    high: float
    start: float
    """Place of ``low`` in the picture."""
    end: float
    """Place of ``high``."""
    ticks: list[Tick]

    def place(self, value: float) -> float:
        """Return the place of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


@dataclass(frozen=True)
class Line:
    """A curve, drawn."""

    name: str
    style: int
    path: str
    is_faint: bool
    markers: list[tuple[float, float]]
    points: str
    """JSON: ``[[x, y, place of x, place of y], ...]``, for the reading under the pointer."""


@dataclass(frozen=True)
class LineChart:
    """A chart, drawn."""

    title: str
    unit: str
    note: str
    frame: Frame
    x: Axis
    y: Axis
    lines: list[Line]
    description: str
    """What the picture shows, in words."""


def axis(values: Sequence[float], start: float, end: float, *, count: int = 5, whole: bool = False) -> Axis:
    """Return an axis around values, with about ``count`` round ticks.

    Args:
        start, end: places of its lower and upper end.
        whole: ticks are integers.
    """
    low, high = min(values), max(values)
    if high - low <= abs(high) * 1e-9:
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    step = _round_step((high - low) / count)
    if whole:
        step = max(1.0, step)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    number = round((high - low) / step)
    # From the values that are shown rather than from round ones where an axis counts steps.
    found = Axis(low, high, start, end, [])
    ticks = [low + index * step for index in range(number + 1)]
    return Axis(low, high, start, end, [Tick(found.place(tick), number_text(tick, step)) for tick in ticks])


def number_text(value: float, step: float) -> str:
    """Write a tick with the digits that tell it from its neighbours."""
    if abs(value) < step * 1e-6:
        return "0"
    if abs(value) >= 1e5 or step < 1e-4:
        digits = max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(step) + 1e-9))
        mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def value_text(value: float) -> str:
    """Write a value for people, with four digits that count."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def draw_chart(chart: Chart, frame: Frame = Frame()) -> LineChart:
    """Draw curves over the steps."""
    points = [point for series in chart.series for point in series.points]
    x = axis([x for x, _ in points], frame.left, frame.width - frame.right, count=6, whole=True)
    y = axis([y for _, y in points], frame.height - frame.bottom, frame.top)
    shown = [series for series in chart.series if not series.is_faint]
    words = "; ".join(f"{series.name}: {_course(series.points)}" for series in shown)
    return LineChart(
        chart.title, chart.unit, chart.note, frame, x, y,
        [_line(series, x, y) for series in chart.series], words,
    )  # fmt: skip


def _line(series: Series, x: Axis, y: Axis) -> Line:
    places = [(x.place(a), y.place(b)) for a, b in series.points]
    path = "M" + "L".join(f"{a:g} {b:g}" for a, b in places)
    markers = places if series.markers == "all" or len(places) == 1 else []
    if series.markers == "some":
        every = max(1, len(places) // _PER_CURVE)
        markers = places[(series.style * every // len(MARKERS)) % every :: every]  # not all curves at the same steps
    both = [[_short(a), _short(b), c, d] for (a, b), (c, d) in zip(series.points, places, strict=True)]
    return Line(series.name, series.style, path, series.is_faint, markers, json.dumps(both, separators=(",", ":")))


def _short(value: float) -> float:
    return int(value) if value == int(value) else float(f"{value:.5g}")


def _course(points: Sequence[Point]) -> str:
    (first_x, first), (last_x, last) = points[0], points[-1]
    if len(points) == 1:
        return f"{value_text(first)} at step {first_x:.0f}"
    return f"{value_text(first)} at step {first_x:.0f}, {value_text(last)} at step {last_x:.0f}"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)

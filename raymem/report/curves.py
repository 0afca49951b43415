"""Chooses the curves of a page: which metrics, of which runs, thinned out and smoothed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from raymem.report.facts import HELD, RunFacts

Point = tuple[float, float]

TITLES = {
    "loss": ("Training loss", "nats per token"),
    "eval_loss": ("Evaluation loss", "nats per token"),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_s": ("Speed", "tokens per second"),
}
"""Maps the metrics that come first to their title and unit; others come behind under their own names."""
_LEFT_OUT = ("step", "epoch", "elapsed_s", "peak_bytes", "predicted_peak_bytes")
_NOISY = ("loss", "grad_norm", "tokens_per_s")
_MOST_POINTS = 400
_FEW, _FEW_OF_MANY = 24, 12
"""Points that all have a marker, on the curve of one run and on those of several."""
_MEAN_OF = 20
"""Noisy curves are smoothed over one part in so many of their steps."""


@dataclass(frozen=True)
class Series:
    """A curve."""

    name: str
    style: int
    """The number of its colour, dashes and marker."""
    points: list[Point]
    markers: Literal["none", "some", "all"] = "none"
    """Which points have a marker; some are enough to tell curves apart."""
    is_faint: bool = False
    """Whether it is the background of another one."""


@dataclass(frozen=True)
class Chart:
    """Curves over the steps, in one pair of axes."""

    title: str
    unit: str
    series: list[Series]
    note: str = ""


def charts_of(runs: Sequence[RunFacts], labels: Sequence[str], only: Collection[str] | None = None) -> list[Chart]:
    """Return the charts of one run, or of several in comparison.

    Args:
        only: leave other metrics out.
    """
    present = {name for run in runs for row in run.rows for name in row if _is_shown(name)}
    present = present if only is None else present & set(only)
    rest = sorted(present - set(TITLES))
    evaluations = [name for name in rest if name.startswith("eval_loss/")]
    order = ["loss", "eval_loss", *evaluations, *list(TITLES)[2:], *(name for name in rest if name not in evaluations)]
    charts = [_chart(name, runs, labels) for name in order if name in present]
    if len(runs) == 1 and {"loss", "eval_loss"} <= present:  # one picture shows whether they part
        both = [
            *charts[0].series,
            *(replace(one, name="evaluation", style=1, markers="all") for one in charts[1].series),
        ]
        charts[:2] = [Chart("Loss", "nats per token", both, charts[0].note)]
    return charts


def summary(run: RunFacts) -> list[tuple[str, float, float, int, float, int]]:
    """Return for each metric: title, last value, lowest with its step, highest with its step."""
    rows = []
    names = {name for row in run.rows for name in row if _is_shown(name)}
    for name in [*(n for n in TITLES if n in names), *sorted(names - set(TITLES))]:
        points = _points(run, name)
        if points:
            low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
            rows.append((title_of(name)[0], points[-1][1], low[1], int(low[0]), high[1], int(high[0])))
    return rows


def title_of(metric: str) -> tuple[str, str]:
    """Return the title of a metric and its unit."""
    base, slash, part = metric.partition("/")
    if base == "eval_loss" and slash:
        return f"Evaluation loss: {part}", TITLES["eval_loss"][1]
    return TITLES.get(metric, (metric, ""))


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """Leave out points of a long curve, but neither end, nor the lowest and highest of any stretch."""
    if len(points) <= most:
        return list(points)
    width = math.ceil(len(points) / (most // 2 - 1))
    kept: list[Point] = []
    for begin in range(0, len(points), width):
        stretch = points[begin : begin + width]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return sorted({points[0], *kept, points[-1]})


def means(points: Sequence[Point], window: int) -> list[Point]:
    """Return at each step the mean of the last ``window`` values, or of as many as there are."""
    sums = [0.0, *accumulate(y for _, y in points)]
    return [
        (x, (sums[index + 1] - sums[max(0, index + 1 - window)]) / min(window, index + 1))
        for index, (x, _) in enumerate(points)
    ]


def _chart(name: str, runs: Sequence[RunFacts], labels: Sequence[str]) -> Chart:
    title, unit = title_of(name)
    curves = [_points(run, name) for run in runs]
    window = max(1, max(map(len, curves)) // _MEAN_OF) if name in _NOISY else 1
    if len(runs) == 1:
        return Chart(title, unit, _of_one(name, title, curves[0], window))
    series = [
        Series(label, index, thinned(means(points, window)), "all" if len(points) <= _FEW_OF_MANY else "some")
        for index, (label, points) in enumerate(zip(labels, curves, strict=True))
        if points
    ]
    return Chart(title, unit, series, f"Mean of the last {window} steps." if window > 1 else "")


def _of_one(name: str, title: str, points: list[Point], window: int) -> list[Series]:
    """Return the curve of one run, behind its mean where it is noisy."""
    subject = "training" if name == "loss" else "each step"
    if window > 1:
        return [
            Series(subject, 0, thinned(points), is_faint=True),
            Series(f"mean of {window} steps", 0, thinned(means(points, window))),
        ]
    if name in _NOISY or len(points) > _FEW * 4:
        return [Series(subject if name == "loss" else title, 0, thinned(points))]
    return [Series(title, 0, thinned(points), "all" if len(points) <= _FEW else "none")]


def _is_shown(name: str) -> bool:
    return name not in _LEFT_OUT and not name.startswith((HELD, "eval_perplexity"))


def _points(run: RunFacts, name: str) -> list[Point]:
    return [(row["step"], row[name]) for row in run.rows if name in row and math.isfinite(row[name])]

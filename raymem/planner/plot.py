"""Draws the timeline of a plan: stacked terms, the phases named, the peak marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raymem.errors import BudgetError
from raymem.memory.budget import bytes_text
from raymem.planner.types import Plan

COLOURS = {
    "weights": "#4c78a8",
    "trainable": "#72b7b2",
    "gradients": "#f58518",
    "optimizer": "#b279a2",
    "activations": "#54a24b",
    "loss": "#e45756",
    "workspace": "#bab0ac",
}
"""Maps each memory term to its colour, the same in every picture."""
_GIB = 1 << 30
_NARROW = 0.1
"""The share of the width below which a phase's name stands upright."""
_SLIVER = 0.015
"""The share of the width below which a stretch has no room for its name, unless it is the phase's widest."""


def draw(plan: Plan, path: Path, title: str, budget_bytes: int | None = None) -> None:
    """Write the picture; its format follows the name.

    Raises:
        BudgetError: it cannot be written, or the plan has no timeline.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not plan.timeline:
        raise BudgetError(f"--plot {path}: there is no timeline, because the model could not be traced ({plan.note})")
    figure, axes = pyplot.subplots(figsize=(11, 5.5), constrained_layout=True)
    steps = range(len(plan.timeline))
    columns = [[point[name] / _GIB for point in plan.timeline] for name in COLOURS]
    axes.stackplot(steps, columns, labels=list(COLOURS), colors=list(COLOURS.values()), step="post")
    sums = [sum(point[name] for name in COLOURS) for point in plan.timeline]
    at = max(steps, key=lambda index: sums[index])
    axes.plot(at, sums[at] / _GIB, "v", color="black")
    axes.annotate(
        f"peak {bytes_text(sums[at])} ({plan.timeline[at]['phase']})", (at, sums[at] / _GIB),
        textcoords="offset points", xytext=(0, 8), ha="right" if at > len(sums) / 2 else "left",
    )  # fmt: skip
    if budget_bytes is not None:
        axes.axhline(budget_bytes / _GIB, color="red", linestyle="--", label="budget")
    stretches = spans([point["phase"] for point in plan.timeline])
    widest = {name: end - start for name, start, end in sorted(stretches, key=lambda span: span[2] - span[1])}
    for name, start, end in stretches:
        if start:
            axes.axvline(start, color="black", linewidth=0.5, alpha=0.3)
        if end - start < min(widest[name], _SLIVER * len(sums)):
            continue
        is_narrow = end - start < _NARROW * len(sums)
        axes.text(
            (start + min(end, len(sums) - 1)) / 2, 0.985, name.replace("_", " "), transform=axes.get_xaxis_transform(),
            ha="center", va="top", rotation=90 if is_narrow else 0, fontsize=8, color="0.25",
        )  # fmt: skip
    axes.set(xlabel="allocations of one step, in order", ylabel="GiB", title=title, xlim=(0, len(sums) - 1))
    # Room above for the names of phases and the mark of the peak.
    axes.set_ylim(0, 1.3 * max(max(sums), budget_bytes or 0) / _GIB)
    axes.legend(loc="lower left", ncols=4)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BudgetError(f"--plot {path}: cannot be written: {error}; give a .png file in a directory") from None
    finally:
        pyplot.close(figure)


def spans(phases: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the stretches of equal phases: name, first index, index after the last."""
    found: list[tuple[str, int, int]] = []
    for index, name in enumerate(phases):
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], index + 1)
        else:
            found.append((name, index, index + 1))
    return found

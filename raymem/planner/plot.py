"""Draws the timeline of a plan: stacked terms, the peak marked."""

from __future__ import annotations

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
    phases = [point["phase"] for point in plan.timeline]
    for index in range(1, len(phases)):
        if phases[index] != phases[index - 1]:
            axes.axvline(index, color="black", linewidth=0.5, alpha=0.3)
    axes.set(xlabel="allocations of one step, in order", ylabel="GiB", title=title, xlim=(0, len(sums) - 1))
    axes.set_ylim(0, 1.12 * max(max(sums), budget_bytes or 0) / _GIB)
    axes.legend(loc="lower left", ncols=4)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BudgetError(f"--plot {path}: cannot be written: {error}; give a .png file in a directory") from None
    finally:
        pyplot.close(figure)

"""Draws the results of methods.py and quality.py: memory by term, loss against memory, loss against steps and time.

python benchmarks/figures.py [--out docs/figures]
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import matplotlib
from provenance import RESULTS, entries
from tables import IN_MEMORY, judged

from raymem.planner.plot import COLOURS

matplotlib.use("Agg")
from matplotlib import pyplot

MIB = 2**20
CURVES = ("LoRA", "full AdamW", "MLorc-AdamW, rank 4", "MLorc-Lion, rank 4", "MoRAM", "LoRAct, n/8", "GaLore", "APOLLO")
SMOOTH = 6
"""Steps that a point of a curve is the mean of: neighbouring steps see different problems."""


def memory(rows: list[dict[str, Any]]) -> Any:
    """Bars: what the planner says is held at the peak, by term, and a mark where the measured peak was."""
    rows = sorted(rows, key=lambda row: row["measured_bytes"], reverse=True)
    figure, axes = pyplot.subplots(figsize=(10, 0.36 * len(rows) + 1.2), constrained_layout=True)
    for at, row in enumerate(rows):
        left = 0.0
        for term, colour in COLOURS.items():
            width = row.get("predicted_terms", {}).get(term, 0) / MIB
            axes.barh(at, width, left=left, color=colour)
            left += width
        if row["peer"]:
            axes.barh(at, row["measured_bytes"] / MIB, color="#d9d9d9")
        axes.plot(row["measured_bytes"] / MIB, at, "|", color="black", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), [f"{row['key']}{' (peer)' if row['peer'] else ''}" for row in rows])
    legend = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in (*COLOURS.values(), "#d9d9d9")]
    measured = pyplot.Line2D([], [], color="black", marker="|", linestyle="", markersize=10)
    axes.legend([*legend, measured], [*COLOURS, "peer", "measured"], loc="upper right", fontsize=8)
    axes.set_xlabel("peak memory of a step, MiB (SmolLM2-135M, fp32, 2 rows of 256 tokens)")
    return figure


def mean_loss(seeds: list[dict[str, Any]]) -> float:
    return float(sum(row["losses"]["answers"] for row in seeds) / len(seeds))


def trade(lines: dict[str, list[dict[str, Any]]], rows: list[dict[str, Any]]) -> Any:
    """Points: loss of held-out answers over measured peak; a line joins those that nothing beats in both."""
    by_name = {row["key"]: row for row in rows}
    points = []
    for name, seeds in lines.items():
        row = by_name.get(IN_MEMORY.get(name, name))
        if row is not None:
            points.append((row["measured_bytes"] / MIB, mean_loss(seeds), name, row["peer"]))
    points.sort()
    figure, axes = pyplot.subplots(figsize=(10, 5.5), constrained_layout=True)
    for peak, loss, name, peer in points:
        axes.plot(peak, loss, "o", color="#e45756", markerfacecolor="white" if peer else "#e45756")
        axes.annotate(name, (peak, loss), textcoords="offset points", xytext=(6, 4), fontsize=8)
    lowest = list(itertools.accumulate((loss for _, loss, _, _ in points), min))
    front = [(peak, loss) for (peak, loss, _, _), least in zip(points, lowest, strict=True) if loss == least]
    axes.step(*zip(*front, strict=True), where="post", color="black", linewidth=0.8, zorder=0)
    axes.set_xlabel("peak memory of a step, MiB")
    axes.set_ylabel("loss of held-out answers after 24 steps")
    axes.margins(x=0.12)
    return figure


def curves(lines: dict[str, list[dict[str, Any]]]) -> Any:
    """Training loss over steps and over CPU time, of the first seed."""
    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, constrained_layout=True)
    for name in CURVES:
        if name not in lines:
            continue
        row = lines[name][0]
        losses = row["train_losses"]
        means = [sum(losses[at - SMOOTH : at]) / SMOOTH for at in range(SMOOTH, len(losses) + 1)]
        by_step.plot(range(SMOOTH, len(losses) + 1), means, label=name)
        by_time.plot(row["cpu_s"][SMOOTH - 1 :], means)
    by_step.set_xlabel("step")
    by_time.set_xlabel("CPU seconds")
    by_step.set_ylabel(f"training loss, mean of {SMOOTH} steps")
    by_step.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    methods, lines = entries(RESULTS / "methods.jsonl"), judged(RESULTS)
    for name, figure in {"memory": memory(methods), "trade": trade(lines, methods), "curves": curves(lines)}.items():
        figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
        print(out / f"{name}.png")


if __name__ == "__main__":
    main()

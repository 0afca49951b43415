"""Reports a sweep: rows, the Pareto front of quality and memory, its table and figure, and the best recipe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from raymem.memory.budget import bytes_text
from raymem.recipe.schema import Recipe
from raymem.recipe.space_load import recipe_at
from raymem.recipe.yaml_text import write
from raymem.storage.errors import writing
from raymem.storage.folders import make_directory
from raymem.sweeps.options import METRICS, Objective, better, is_score
from raymem.sweeps.search import started

REPORT = "report"
"""The directory of the report in that of its sweep."""
TABLE, BEST = "pareto.md", "best.yaml"
STATUSES = ("running", "finished", "stopped", "infeasible", "failed", "crashed", "refused")


@dataclass(frozen=True)
class SweepRow:
    """One proposal of a sweep."""

    number: int
    status: str
    """One of :data:`STATUSES`; ``stopped`` is early, ``refused`` never started."""
    point: dict[str, Any]
    metrics: dict[str, float]
    """The values of :data:`raymem.sweeps.options.METRICS` that it reported, and those of its answers."""
    predicted_bytes: int | None
    """Predicted peak of a step; for a refused proposal the memory that it would need at least."""
    measured_bytes: int | None
    """The peak that the meter measured; for a trial that ran out of memory, what it had taken by then."""
    overhead_s: float | None
    """Seconds besides its training, once it has finished."""
    problem: str | None


def rows_of(trials: Sequence[FrozenTrial]) -> list[SweepRow]:
    """Return a row for every proposal that was judged, in order."""
    rows = []
    for trial in trials:
        facts = trial.user_attrs
        if not started(trial) and facts.get("status") != "refused":  # repeated, or cut off before it was judged
            continue
        status = facts.get("status", "running" if trial.state == TrialState.RUNNING else "crashed")
        metrics = {name: facts[name] for name in facts if name in METRICS or is_score(name)}
        measured = facts.get("measured_bytes") or metrics.get("peak_bytes")
        rows.append(SweepRow(
            trial.number, status, facts["point"], metrics, facts.get("predicted_bytes"),
            None if measured is None else int(measured), facts.get("overhead_s"), facts.get("problem"),
        ))  # fmt: skip
    return rows


def finished(rows: Sequence[SweepRow], metrics: Sequence[str]) -> list[SweepRow]:
    """Return the rows that came to their end and have all of these metrics."""
    return [row for row in rows if row.status == "finished" and all(name in row.metrics for name in metrics)]


def pareto(rows: Sequence[SweepRow], metrics: Sequence[str]) -> list[SweepRow]:
    """Return the finished rows that no other one beats in every metric, sorted by the first."""
    done = finished(rows, metrics)

    def costs(row: SweepRow) -> tuple[float, ...]:
        return tuple(row.metrics[name] * (1 if better(name) == "min" else -1) for name in metrics)

    def beaten(row: SweepRow) -> bool:
        mine = costs(row)
        return any(
            all(a <= b for a, b in zip(costs(other), mine, strict=True)) and costs(other) != mine for other in done
        )

    front = [row for row in done if not beaten(row)]
    return sorted(front, key=costs)


def best_of(rows: Sequence[SweepRow], objective: Objective) -> SweepRow | None:
    """Return the finished row with the best first metric."""
    front = pareto(rows, objective.metrics)
    return front[0] if front else None


def write_report(
    folder: Path, trials: Sequence[FrozenTrial], recipe: Recipe, objective: Objective, budget_bytes: int
) -> list[SweepRow]:
    """Write ``trials.json``, ``pareto.md``, ``pareto.png`` and, if any trial finished, ``best.yaml``.

    The front in the table is that of all objectives and of memory; the figure shows the first of them against memory.
    """
    rows = rows_of(trials)
    with writing(folder, where="TMPDIR", then="run the same command again: the trials are kept"):
        make_directory(folder)
        _write_files(folder, rows, trials, recipe, objective, budget_bytes)
    return rows


def _write_files(
    folder: Path, rows: Sequence[SweepRow], trials: Sequence[FrozenTrial], recipe: Recipe, objective: Objective,
    budget_bytes: int,
) -> None:  # fmt: skip
    (folder / "trials.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    names = list(dict.fromkeys([*objective.metrics, "peak_bytes"]))
    (folder / TABLE).write_text(_page(rows, pareto(rows, names), trials, names, budget_bytes))
    quality = next((name for name in objective.metrics if name != "peak_bytes"), "eval_loss")
    _draw(folder / "pareto.png", rows, pareto(rows, (quality, "peak_bytes")), quality, budget_bytes)
    best = best_of(rows, objective)
    if best is not None:
        (folder / BEST).write_text(best_recipe(recipe, best, objective.metrics[0], budget_bytes))


def best_recipe(recipe: Recipe, best: SweepRow, metric: str, budget_bytes: int) -> str:
    """Write the recipe of a row as YAML, to train it anew."""
    chosen = recipe_at(recipe, best.point, "best").to_dict()
    del chosen["space"], chosen["name"]  # it is named by its file
    chosen["budget"] = f"{budget_bytes}B"
    comment = f"# Trial {best.number} of sweep {recipe.name}: {metric} {_value_text(best, metric)}"
    if metric != "peak_bytes" and "peak_bytes" in best.metrics:
        comment += f", peak {_value_text(best, 'peak_bytes')}"
    return f"{comment}\n" + write(chosen)


def point_text(point: dict[str, Any]) -> str:
    """Write a point on one line."""
    return " ".join(f"{path}={_short(value)}" for path, value in point.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _value_text(row: SweepRow, metric: str) -> str:
    value = row.metrics[metric]
    return bytes_text(int(value)) if metric.endswith("_bytes") else f"{value:.4f}"


def _page(
    rows: Sequence[SweepRow], front: Sequence[SweepRow], trials: Sequence[FrozenTrial], names: Sequence[str],
    budget: int,
) -> str:  # fmt: skip
    counts = Counter(row.status for row in rows)
    told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    repeated = sum("same_as" in trial.user_attrs for trial in trials)
    lines = [
        f"Budget {bytes_text(budget)}. {sum(map(started, trials))} trials of {len(rows)} proposals: {told}"
        + (f"; {repeated} more had been trained before." if repeated else "."),
        "",
        f"| trial | {' | '.join(names)} | predicted peak | of budget | point |",
        f"|---|{'---|' * len(names)}---|---|---|",
    ]
    for row in front:
        measured, predicted = row.metrics["peak_bytes"], row.predicted_bytes or 0
        values = " | ".join(_value_text(row, name) for name in names)
        lines.append(
            f"| {row.number} | {values} | {bytes_text(predicted)} ({measured / max(1, predicted) - 1:+.2%}) | "
            f"{measured / budget:.0%} | `{point_text(row.point)}` |"
        )
    return "\n".join(lines) + "\n"


def _draw(path: Path, rows: Sequence[SweepRow], front: Sequence[SweepRow], quality: str, budget: int) -> None:
    """Plot quality against measured memory: the front in colour, dominated points grey, beyond the budget shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = finished(rows, (quality, "peak_bytes"))
    refused = [row.predicted_bytes for row in rows if row.status == "refused" and row.predicted_bytes]
    every = [*(row.measured_bytes or 0 for row in done), *refused, budget]
    unit, name = next((size, name) for size, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1, "B")) if budget >= size)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    right = max(every) / unit * 1.05
    axes.axvspan(budget / unit, right, color="tab:red", alpha=0.08, label="above the budget")
    axes.axvline(budget / unit, color="tab:red", linewidth=1)
    on_front = {row.number for row in front}
    grey = [row for row in done if row.number not in on_front]
    axes.scatter([(r.measured_bytes or 0) / unit for r in grey], [r.metrics[quality] for r in grey], color="0.7",
                 label="dominated")  # fmt: skip
    by_memory = sorted(front, key=lambda row: row.measured_bytes or 0)
    axes.plot([(r.measured_bytes or 0) / unit for r in by_memory], [r.metrics[quality] for r in by_memory],
              "o-", color="tab:blue", drawstyle="steps-post", label="Pareto front")  # fmt: skip
    for row in by_memory:
        axes.annotate(str(row.number), ((row.measured_bytes or 0) / unit, row.metrics[quality]), xytext=(4, 4),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    if refused:
        low = axes.get_ylim()[0]
        axes.plot([size / unit for size in refused], [low] * len(refused), "|", color="tab:red", markersize=10,
                  label="refused (at least)", clip_on=False)  # fmt: skip
    axes.set_xlim(0, right)
    axes.set_xlabel(f"peak memory of a worker [{name}]")
    axes.set_ylabel(quality)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

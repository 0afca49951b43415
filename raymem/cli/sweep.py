"""``raymem sweep``: search a space of recipes under a memory budget."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.text import Text

from raymem.cli import console
from raymem.cli.options import Fresh, Overrides, RecipeFile, Verbose
from raymem.cli.signals import goes_on
from raymem.memory.budget import bytes_text

if TYPE_CHECKING:
    from raymem.recipe.schema import Recipe
    from raymem.recipe.space import Space
    from raymem.sweeps.options import SweepOptions
    from raymem.sweeps.report import SweepRow

_SHOWN = 12
_NUMBERS_WIDTH = 56
"""Columns that a table's numbers take beside the point."""


def sweep(
    recipe: RecipeFile,
    space: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Search space: one that ships with raymem (joint, loram, loract, mlorc, moram), a .py or a .yaml "
            "file. Default: the recipe's `space`."
        ),
    ] = None,
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Memory of one worker's device, e.g. 24GiB. Default: the recipe's budget."),
    ] = None,
    gpu: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Kind of GPU, e.g. H100-80GB: its memory is the budget."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Trials to start; what is refused does not count.")] = 50,
    objective: Annotated[str, typer.Option(help="Metric to look for.")] = "eval_loss",
    also: Annotated[
        str, typer.Option(help="More metrics, comma-separated: looks for the Pareto front of all of them.")
    ] = "",
    algorithm: Annotated[str, typer.Option(help="tpe, nsga2, random or grid.")] = "tpe",
    early_stopping: Annotated[
        bool,
        typer.Option(
            "--early-stopping/--no-early-stopping", help="Stop what is clearly worse (ASHA); with --also nothing is."
        ),
    ] = True,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the sweep; the same name goes on. Default: <name of the recipe>-sweep."),
    ] = None,
    set_: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    verbose: Verbose = False,
) -> None:
    """Search ranks, sparsity and methods: only what is predicted to fit is tried. A killed sweep goes on."""
    from raymem.errors import RecipeError
    from raymem.recipe.load import load_recipe
    from raymem.training.data.sources.early import check_files_are_here

    console.log_to_stderr(verbose)
    loaded = load_recipe(recipe, set_)
    check_files_are_here(loaded)
    named, dimensions, options = options_of(
        loaded,
        space=space,
        budget=budget,
        gpu=gpu,
        samples=samples,
        objective=objective,
        also=also,
        algorithm=algorithm,
        early_stopping=early_stopping,
        name=name,
    )
    with goes_on("the same command goes on"):
        from raymem.sweeps import driver as sweeps

        with SweepDisplay(options.objective.metrics[0], samples) as display:
            done = sweeps.sweep(named, dimensions, options, fresh=fresh, status=display.status, watch=display.show)
    say = console.out.print
    say(done.table, markup=False)
    if done.gave_up:
        say(f"ended early: {done.gave_up}")
    say(f"figure and tables: {done.report}")
    if done.best is None:
        raise RecipeError(f"no trial finished; the problems stand in trials.json of {done.report}")
    for line in done.tracking.summary_lines():
        say(line)
    if done.tracking.problem:
        console.err.print(f"warning: {done.tracking.problem}")
    if "://" in done.best:
        say(f"next: copy {done.best} here, and raymem train best.yaml")
    else:
        say(f"next: raymem train {done.best}")


def options_of(
    recipe: Recipe, *, objective: str, also: str, **options: Any
) -> tuple[Recipe, Space, SweepOptions]:  # fmt: skip
    """Return the recipe of the sweep, its space and the options of the search, from the options of the command.

    Raises:
        RaymemError: an option that no sweep can work with.
    """
    from raymem.sweeps.options import as_option, resolve_sweep

    metrics = [objective, *(metric.strip() for metric in also.split(",") if metric.strip())]
    return resolve_sweep(recipe, metrics=metrics, spelling=as_option, **options)


class SweepDisplay:
    """Shows trials in a table that renews itself on a terminal; elsewhere a line when one begins and when it ends."""

    def __init__(self, metric: str, samples: int) -> None:
        self._metric, self._samples = metric, samples
        self._live: Any = None
        self._told: dict[int, str] | None = None

    def __enter__(self) -> SweepDisplay:
        if console.out.is_terminal:
            from rich.live import Live

            self._live = Live(console=console.out, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._live.stop()

    def status(self, text: str) -> None:
        """Show a line about the work before the first trial."""
        console.out.print(text, style="dim" if console.out.is_terminal else None, markup=False)

    def show(self, rows: list[SweepRow]) -> None:
        """Show all rows, as they are now."""
        if self._told is None:
            self._told = {row.number: row.status for row in rows if _ended(row)}  # by an earlier session
            if self._told:
                self.status(f"going on: {len(self._told)} of {self._samples} trials are done")
        if self._live is not None:
            self._live.update(self._table(rows))
            return
        for row in rows:
            if (_ended(row) or row.status == "running") and self._told.get(row.number) != row.status:
                self._told[row.number] = row.status
                console.out.print(f"[{self._counts(rows)}] {self._line(row)}", markup=False)

    def _counts(self, rows: Sequence[SweepRow]) -> str:
        """Count what has been told so far, of which several may have come at once."""
        told = Counter(map("running".__eq__, (self._told or {}).values()))
        refused = sum(row.status == "refused" for row in rows)
        return f"{told[False]}/{self._samples} done, {told[True]} running, {refused} refused"

    def _line(self, row: SweepRow) -> str:
        from raymem.sweeps.report import point_text

        value = row.metrics.get(self._metric)
        parts = [f"trial {row.number} {row.status}", "" if value is None else f"{self._metric} {self._figure(value)}"]
        if row.measured_bytes:
            parts.append(f"peak {bytes_text(row.measured_bytes)}")
        elif row.predicted_bytes is not None:
            parts.append(f"predicted {bytes_text(row.predicted_bytes)}")
        if row.problem:
            parts.append(row.problem)
        return "  ".join([*filter(None, parts), point_text(row.point)])

    def _table(self, rows: Sequence[SweepRow]) -> Any:
        from rich.table import Table

        from raymem.sweeps.report import point_text

        counts = Counter(row.status for row in rows)
        refused, running, waiting = (counts.pop(status, 0) for status in ("refused", "running", "waiting"))
        kinds = ", ".join(f"{count} {status}" for status, count in counts.items())
        parts = [f"{counts.total()}/{self._samples} done{f' ({kinds})' if kinds else ''}", f"{running} running"]
        parts += [f"{waiting} waiting"] * bool(waiting)
        title = ", ".join([*parts, f"{refused} refused"])
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("trial", "status", self._metric, "peak", "predicted"):
            table.add_column(column, justify="left" if column == "status" else "right", no_wrap=True)
        table.add_column("point", overflow="fold")
        for row in self._fitting(rows):
            value = row.metrics.get(self._metric)
            sizes = (row.measured_bytes, row.predicted_bytes)
            table.add_row(
                str(row.number),
                row.status,
                "" if value is None else self._figure(value),
                *("" if size is None else bytes_text(size) for size in sizes),
                Text(point_text(row.point)),
            )
        return table

    def _figure(self, value: float) -> str:
        return bytes_text(int(value)) if self._metric.endswith("_bytes") else f"{value:.4f}"

    def _fitting(self, rows: Sequence[SweepRow]) -> list[SweepRow]:
        """Return the rows that there is room for: what runs, and what came last."""
        from raymem.sweeps.report import point_text

        trials = [row for row in rows if row.status != "refused"]
        longest = max((len(point_text(row.point)) for row in trials), default=1)
        lines_each = -(-longest // max(10, console.out.width - _NUMBERS_WIDTH))
        room = max(2, min(_SHOWN, (console.out.height - 4) // lines_each))
        by_interest = sorted(trials, key=lambda row: (row.status == "running", row.number), reverse=True)
        return sorted(by_interest[:room], key=lambda row: row.number)


def _ended(row: SweepRow) -> bool:
    return row.status not in ("running", "waiting", "refused")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(sweep)

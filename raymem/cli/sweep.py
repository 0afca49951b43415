"""``raymem sweep``: search a space of recipes under a memory budget."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from raymem.cli import console
from raymem.cli.options import Fresh, Overrides, RecipeFile, Verbose
from raymem.cli.signals import say_and_exit
from raymem.memory.budget import bytes_text

if TYPE_CHECKING:
    from raymem.recipe.schema import Recipe
    from raymem.recipe.space import Space
    from raymem.sweeps.options import SweepOptions
    from raymem.sweeps.report import SweepRow

_SHOWN = 12


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
    from raymem.sweeps import driver as sweeps

    metrics = options.objective.metrics
    try:
        with SweepDisplay(metrics[0], samples) as display:
            done = sweeps.sweep(named, dimensions, options, fresh=fresh, status=display.status, watch=display.show)
    except (KeyboardInterrupt, SystemExit) as stop:
        raise say_and_exit(stop, "the same command goes on") from None
    say = console.out.print
    say((done.folder / "report" / "pareto.md").read_text(), markup=False)
    if done.gave_up:
        say(f"ended early: {done.gave_up}")
    say(f"figure and tables: {done.folder / 'report'}")
    if done.best is None:
        raise RecipeError(f"no trial finished; the problems stand in {done.folder / 'report' / 'trials.json'}")
    for line in done.tracking.summary_lines():
        say(line)
    if done.tracking.problem:
        console.err.print(f"warning: {done.tracking.problem}")
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
    """Shows the last trials as a table that renews itself on a terminal, one line per trial elsewhere."""

    def __init__(self, metric: str, samples: int) -> None:
        self._metric, self._samples = metric, samples
        self._live: Any = None
        self._told: set[int] = set()

    def __enter__(self) -> SweepDisplay:
        if console.out.is_terminal:
            from rich.live import Live

            self._live = Live(console=console.out, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def status(self, text: str) -> None:
        """Show a line about the work before the first trial."""
        console.out.print(f"[dim]{text}[/dim]" if console.out.is_terminal else text)

    def show(self, rows: list[SweepRow]) -> None:
        """Show all rows, as they are now."""
        if self._live is not None:
            self._live.update(self._table(rows))
            return
        counts = Counter(row.status for row in rows)
        for row in rows:
            if row.status not in ("running", "refused") and row.number not in self._told:
                self._told.add(row.number)
                started = len(rows) - counts["refused"]
                console.out.print(
                    f"[{started}/{self._samples}, {counts['refused']} refused] {self._line(row)}", markup=False
                )

    def _line(self, row: SweepRow) -> str:
        from raymem.sweeps.report import point_text

        value = row.metrics.get(self._metric)
        parts = [f"trial {row.number} {row.status}", "" if value is None else f"{self._metric} {value:.4f}"]
        if row.measured_bytes:
            parts.append(f"peak {bytes_text(row.measured_bytes)}")
        if row.problem:
            parts.append(row.problem)
        return "  ".join([*filter(None, parts), point_text(row.point)])

    def _table(self, rows: list[SweepRow]) -> Any:
        from rich.table import Table

        from raymem.sweeps.report import point_text

        counts = Counter(row.status for row in rows)
        refused = counts.pop("refused", 0)
        told = ", ".join(f"{count} {status}" for status, count in counts.items())
        title = f"{counts.total()} of {self._samples} trials: {told}; {refused} proposals refused"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("trial", "status", self._metric, "peak", "predicted", "point"):
            table.add_column(column, justify="left" if column in ("status", "point") else "right")
        for row in [row for row in rows if row.status != "refused"][-_SHOWN:]:
            value = row.metrics.get(self._metric)
            sizes = (row.measured_bytes, row.predicted_bytes)
            table.add_row(
                str(row.number),
                row.status,
                "" if value is None else f"{value:.4f}",
                *("" if size is None else bytes_text(size) for size in sizes),
                point_text(row.point),
            )
        return table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(sweep)

"""Displays progress while a command runs: a rich progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from raymem.memory.budget import bytes_text
from raymem.training.reporter import Row

LINE_EVERY_S = 10.0
"""The least time between two plain lines; evaluations and the first and last step are always shown."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def hush_libraries() -> None:
    """Keep other libraries' chatter (progress bars, deprecations, advice) out of raymem's output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")


def log_to_stderr(verbose: bool) -> None:
    """Show warnings, or with ``verbose`` everything; call it before libraries are imported."""
    if not verbose:
        hush_libraries()
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    logging.getLogger("raymem").setLevel(logging.DEBUG if verbose else logging.WARNING)


class TrainingDisplay:
    """Context manager that shows the metric rows handed to :meth:`show`.

    Args:
        total_steps: steps of the run, if known before the data is.
    """

    def __init__(self, total_steps: int | None) -> None:
        self._total = total_steps
        self._peak_bytes = 0.0
        self._latest_eval = ""
        self._last_line = 0.0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingDisplay:
        if out.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
            )  # fmt: skip
            self._progress = Progress(*columns, console=out)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def status(self, text: str) -> None:
        """Show a line about the work before training."""
        out.print(text, style="dim" if out.is_terminal else None, markup=False)

    def show(self, rows: Sequence[Row]) -> None:
        """Show new metric rows, oldest first."""
        for row in rows:
            self._peak_bytes = max(self._peak_bytes, row.get("peak_bytes", 0.0))
            if "eval_loss" in row:
                self._latest_eval = f"eval {row['eval_loss']:.3f} (ppl {row['eval_perplexity']:.1f})"
            if self._progress is None and self._worth_a_line(row):
                self._last_line = time.monotonic()
                total = f"/{self._total}" if self._total else ""
                out.print(f"step {row['step']:.0f}{total}  {self._numbers(row, evaluated='eval_loss' in row)}")
        if self._progress is not None and rows:
            if self._task is None:
                self._task = self._progress.add_task("training", total=self._total, numbers="")
            numbers = self._numbers(rows[-1], evaluated=True)
            self._progress.update(self._task, completed=rows[-1]["step"], numbers=numbers)

    def _worth_a_line(self, row: Row) -> bool:
        edge = row["step"] in (1, self._total)
        return edge or "eval_loss" in row or time.monotonic() - self._last_line >= LINE_EVERY_S

    def _numbers(self, row: Row, *, evaluated: bool) -> str:
        parts = [f"loss {row['loss']:.3f}", f"{row['tokens_per_s']:.0f} tokens/s"]
        if evaluated and self._latest_eval:
            parts.append(self._latest_eval)
        if self._peak_bytes:
            parts.append(f"peak {bytes_text(self._peak_bytes)}")
        return "  ".join(parts)


def plan_table(terms: Mapping[str, int], phases: Mapping[str, Mapping[str, int]]) -> Table:
    """Return the table of ``raymem plan``: for each term its bytes at the peak and at that of each phase."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("at the peak", *phases):
        table.add_column(name, justify="right", no_wrap=True)
    for term, size in terms.items():
        table.add_row(term, bytes_text(size), *(bytes_text(phase[term]) for phase in phases.values()))
    sums = (bytes_text(phase["peak_bytes"]) for phase in phases.values())
    table.add_row("[bold]sum[/bold]", f"[bold]{bytes_text(sum(terms.values()))}[/bold]", *sums)
    return table


def print_whole(table: Table) -> None:
    """Print a table of numbers, none of them cut; a terminal that is too narrow wraps the lines."""
    width = out.width
    out.width = max(width, out.measure(table, options=out.options.update(width=1000)).maximum)
    try:
        out.print(table, crop=False)
    finally:
        out.width = width


def holders_table(rows: Sequence[tuple[str, str, str, int, int]], *, wide: bool) -> Table:
    """Return the table of the largest holders at the peak: name, category, operation, bytes, how many tensors.

    Args:
        wide: with the operations; else long names of modules lose what all of them begin with, and the rest is shown
            whole.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("term", no_wrap=True)
    if wide:
        table.add_column("by", no_wrap=True)
    table.add_column("held at the peak", no_wrap=True)
    for name, category, operation, size, count in rows:
        shown = name if wide else name.removeprefix("base_model.model.").removeprefix("model.")
        cells = [bytes_text(size), str(count), category, *([operation] if wide else [])]
        table.add_row(*cells, Text(shown or "(outside the layers)"))
    return table


def checks_table(rows: Sequence[tuple[str, bool | None, str, str]]) -> Table:
    """Return the table of ``raymem doctor``: name, ok (None is a warning), detail, cure."""
    table = Table(box=None, pad_edge=False, show_header=False)
    words = {True: "[green]ok[/green]", False: "[red]FAIL[/red]", None: "[yellow]note[/yellow]"}
    for name, ok, detail, cure in rows:
        table.add_row(words[ok], name, detail + (f"\n[bold]-> {cure}[/bold]" if cure else ""))
    return table

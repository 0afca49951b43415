"""Displays progress while a command runs: a rich progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raymem.memory.budget import bytes_text
from raymem.training.reporter import Row

LINE_EVERY_S, LINES_LATER_EVERY_S = 10.0, 60.0
"""The least time between two plain lines, at first and after an hour; evaluations and the first and last step are
always shown."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a line about what goes on to standard error, beside a result on standard output."""
    err.print(text, markup=False, style="dim" if err.is_terminal else None)


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
    """Context manager that shows how a training goes: on a terminal in lines that renew themselves."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._began = self._last_line = time.monotonic()
        self.begin(None)

    def begin(self, total_steps: int | None) -> None:
        """Show another training.

        Args:
            total_steps: the number of its steps, if that is known.
        """
        self._total = total_steps
        self._row: Row | None = None
        self._pace = Pace()
        self._peak_bytes = 0.0
        self._latest_eval = ""

    def __enter__(self) -> TrainingDisplay:
        if out.is_terminal:
            self._live = Live(console=out, get_renderable=self._renewed, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._said = None
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._live.stop()

    _said: float | None = None
    """When the last status was shown, if nothing has come since."""

    def status(self, text: str) -> None:
        """Show a line about the work before a training's first step, or after its last one."""
        if self._live is not None and self._row is not None:
            out.print(self._renewed(), soft_wrap=False)  # which stays, above the new line
            self._row = None
        self._said = time.monotonic()
        out.print(text, style="dim" if out.is_terminal else None, markup=False)

    def show(self, rows: Sequence[Row]) -> None:
        """Show the rows of steps that were taken, oldest first."""
        for row in rows:
            self._row, self._said = row, None
            self._pace.add(row)
            self._peak_bytes = max(self._peak_bytes, row.get("peak_bytes", 0.0))
            if "eval_loss" in row:
                self._latest_eval = f"eval {row['eval_loss']:.3f} (ppl {row['eval_perplexity']:.4g})"
            if self._live is None and self._worth_a_line(row):
                self._last_line = time.monotonic()
                numbers = self._numbers(row, evaluated="eval_loss" in row)
                out.print("  ".join([f"step {self._position(row)}", *numbers, *self._time_to_go(row)]))

    def _worth_a_line(self, row: Row) -> bool:
        now = time.monotonic()
        every_s = min(LINES_LATER_EVERY_S, max(LINE_EVERY_S, (now - self._began) / 60))
        return row["step"] in (1, self._total) or "eval_loss" in row or now - self._last_line >= every_s

    def _position(self, row: Row) -> str:
        return f"{row['step']:.0f}/{self._total}" if self._total else f"{row['step']:.0f}"

    def _numbers(self, row: Row, *, evaluated: bool) -> list[str]:
        parts = [f"loss {row['loss']:.3f}", f"lr {row['lr']:.3g}", f"{row['tokens_per_s']:.0f} tokens/s"]
        if evaluated and self._latest_eval:
            parts.append(self._latest_eval)
        if self._peak_bytes:
            parts.append(f"peak {bytes_text(self._peak_bytes)}")
        return parts

    def _time_to_go(self, row: Row) -> list[str]:
        """Return the words for it, or none while it is not known or over."""
        left_s = self._pace.left_s(row["step"], self._total)
        return [] if not left_s else [f"{duration(left_s)} to go"]

    def _renewed(self) -> Group:
        """Return what a terminal shows now below the lines that stay."""
        if self._row is None:
            waited_s = 0.0 if self._said is None else time.monotonic() - self._said
            return Group(Text(f"... {duration(waited_s)}", style="dim")) if waited_s >= 2 else Group()
        position = [f"step {self._position(self._row)}", *self._time_to_go(self._row)]
        lines: list[RenderableType] = []
        if self._total:
            bar = ProgressBar(total=self._total, completed=self._row["step"], width=min(out.width, 80))
            lines.append(Padding(bar, 0))  # which ends its line
        parts = [*position, *self._numbers(self._row, evaluated=True)]
        return Group(*lines, *(Text(line, no_wrap=True) for line in flowed(parts, out.width)))


class Pace:
    """Learns how long steps take, from rows; one slow step, as the first, tells nothing about the others.

    An evaluation or a checkpoint between two steps counts as often as it has come so far.
    """

    _LEAST = 3
    """Steps after which it is known."""

    def __init__(self) -> None:
        self._recent_s: deque[float] = deque(maxlen=100)
        self._count = 0
        self._pauses_s = 0.0
        self._last: tuple[float, float] | None = None
        self._at = 0.0

    def add(self, row: Row) -> None:
        """Learn from the next row."""
        last, self._last = self._last, (row["step"], row["elapsed_s"])
        self._at = time.monotonic()
        # A step whose memory is measured takes longer; a step that is taken again follows none.
        if last is None or row["step"] != last[0] + 1 or "peak_bytes" in row:
            return
        took_s = row["elapsed_s"] - last[1]
        self._count += 1
        if self._count > self._LEAST and took_s > 3 * (usual_s := median(self._recent_s)):
            self._pauses_s += took_s - usual_s
        self._recent_s.append(took_s)

    def left_s(self, step: float, total_steps: int | None) -> float | None:
        """Return how many seconds the steps behind ``step`` will take; None if that is not known."""
        if total_steps is None or self._count < self._LEAST:
            return None
        each_s = median(self._recent_s) + self._pauses_s / self._count
        since_s = time.monotonic() - self._at
        return max(0.0, (total_steps - step) * each_s - since_s)


def flowed(parts: Sequence[str], width: int) -> list[str]:
    """Set parts side by side in lines of at most ``width`` characters, without cutting one."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def duration(seconds: float) -> str:
    """Return a time for people: ``0:07``, ``1:02:33``, ``2 d 4 h``."""
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def plan_table(
    terms: Mapping[str, int], phases: Mapping[str, Mapping[str, int]], host_terms: Mapping[str, int]
) -> Table:
    """Return the table of ``raymem plan``: for each term its bytes at the peak and at that of each phase.

    Args:
        host_terms: bytes of each term in the memory of the host; without any there is no such column.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    host = ("host",) if host_terms else ()
    for name in ("at the peak", *host, *phases):
        table.add_column(name, justify="right", no_wrap=True)
    for term, size in terms.items():
        on_host = [bytes_text(host_terms[term]) for _ in host]
        table.add_row(term, bytes_text(size), *on_host, *(bytes_text(phase[term]) for phase in phases.values()))
    sums = [bytes_text(phase["peak_bytes"]) for phase in phases.values()]
    on_host = [bytes_text(sum(host_terms.values())) for _ in host]
    table.add_row("[bold]sum[/bold]", f"[bold]{bytes_text(sum(terms.values()))}[/bold]", *on_host, *sums)
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

"""Builds the page: facts in, one HTML text out, which loads nothing and runs no code but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from raymem import __version__
from raymem.errors import RecipeError
from raymem.memory.budget import bytes_text
from raymem.recipe.yaml_text import write
from raymem.report.bars import draw_bars, memory_table
from raymem.report.compare import differences
from raymem.report.curves import charts_of, summary
from raymem.report.drawing import MARKERS, draw_chart, value_text
from raymem.report.facts import MOST_RUNS, RunFacts
from raymem.report.front import draw_front
from raymem.report.sweep_facts import SweepFacts
from raymem.text import printable


def runs_page(runs: Sequence[RunFacts]) -> str:
    """Build the page of one run, or of a comparison.

    Raises:
        RecipeError: there are more than can be compared.
    """
    check_number(len(runs))
    labels = labels_of(runs)
    title = labels[0] if len(runs) == 1 else f"{len(runs)} runs compared"
    return _render(
        "run.html.j2",
        title=title,
        runs=list(zip(labels, runs, strict=True)),
        charts=[draw_chart(chart) for chart in charts_of(runs, labels)],
        summaries=[summary(run) for run in runs],
        bars=draw_bars(runs, labels),
        tables=[memory_table(run) for run in runs],
        differences=differences([run.recipe for run in runs]) if len(runs) > 1 else [],
    )


def sweep_page(sweep: SweepFacts) -> str:
    """Build the page of a sweep."""
    runs = [run for _, run in sweep.runs]
    charts = charts_of(runs, [f"trial {row.number}" for row, _ in sweep.runs], only=("loss", "eval_loss"))
    drawn = [draw_chart(chart) for chart in charts]
    return _render("sweep.html.j2", title=sweep.name, sweep=sweep, front=draw_front(sweep), charts=drawn)


def check_number(number: int) -> None:
    """Refuse more runs than can be compared. Raises RecipeError."""
    if number > MOST_RUNS:
        raise RecipeError(
            f"{number} runs are more than the {MOST_RUNS} that one page compares: more curves cannot be told apart; "
            f"give at most {MOST_RUNS}, or make several pages"
        )


def labels_of(runs: Sequence[RunFacts]) -> list[str]:
    """Return a name for each run that no other one has."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({run.place})" for name, run in zip(names, runs, strict=True)]


def _render(template: str, **values: Any) -> str:
    style, script = _asset("page.css"), _asset("page.js")
    return _environment().get_template(template).render(
        style=Markup(style),  # noqa: S704 - our own files; everything else is escaped
        script=Markup(script),  # noqa: S704
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        markers=MARKERS,
        **values,
    )  # fmt: skip


def _overrides(point: Mapping[str, Any]) -> list[str]:
    """Write a point as options that give a recipe its values, all digits included, as a shell takes them."""
    plain = {path: value if isinstance(value, str) else json.dumps(value) for path, value in point.items()}
    return [f"-s {shlex.quote(f'{path}={value}')}" for path, value in plain.items()]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("raymem.report", "templates"),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": bytes_text, "value": value_text, "yaml": write, "overrides": _overrides}
    return environment


def _printable(value: Any) -> Any:
    """Write out control characters and those that reorder a line, wherever a text comes from."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _asset(name: str) -> str:
    return (resources.files("raymem.report") / "templates" / name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    """Return what the policy of the page says about an inline text that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"

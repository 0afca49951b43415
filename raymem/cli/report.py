"""``raymem report``: a page about runs, or about a sweep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from raymem.cli import console
from raymem.cli.options import Overrides
from raymem.errors import RecipeError


def report(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|SWEEP...",
            help="Recipe, directory or URI of a run, or several to compare (at most 8); or one sweep.",
            show_default=False,
        ),
    ],
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="File to write.", show_default=False)],
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Write a page to look at: curves, memory, data with its targets, predictions; of a sweep the Pareto front.

    It is one file that needs neither network nor server.
    """
    console.log_to_stderr(False)
    from raymem.report.find import find, is_recipe

    if html.is_dir():
        raise RecipeError(f"--html {html}: is a directory; give the name of a file in it")
    if set_ and not any(map(is_recipe, what)):
        raise RecipeError(f"--set {set_[0]}: changes a recipe, and none was given; leave it out, or name a recipe file")
    places = [find(target, set_ if is_recipe(target) else ()) for target in what]
    sweeps = [place for place in places if place.is_sweep]
    if sweeps and len(places) > 1:
        raise RecipeError(f"{sweeps[0].name}: is a sweep, which has a page of its own; give it alone, or runs only")
    from raymem.report import page

    page.check_number(len(places))
    if sweeps:
        from raymem.report.sweep_facts import read_sweep

        text = page.sweep_page(read_sweep(sweeps[0]))
    else:
        from raymem.report.facts import read_run, with_plans

        text = page.runs_page(with_plans([read_run(place) for place in places], console.err.print))
    _write(html, text)
    console.out.print(f"wrote {html}: open it in a browser", markup=False)


def _write(path: Path, text: str) -> None:
    """Write the page whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(text.encode("utf-8", "replace"))  # data may hold halves of characters
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RecipeError(
            f"--html {path}: cannot be written: {error.strerror}; give a file in a directory that is there and may be "
            "written"
        ) from None


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)

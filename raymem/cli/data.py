"""``raymem data``: what becomes of a recipe's data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from raymem.cli import console
from raymem.cli.options import Overrides, RecipeFile, Verbose
from raymem.errors import RecipeError

if TYPE_CHECKING:
    from raymem.training.data.summary import Part


def data(
    recipe: RecipeFile,
    number: Annotated[int, typer.Argument(min=0, metavar="[N]", help="Examples to print.")] = 3,
    set_: Overrides = [],  # noqa: B006
    show: Annotated[bool, typer.Option("--show/--no-show", help="Print N examples below the figures.")] = True,
    split: Annotated[str, typer.Option(help="train or eval.")] = "train",
    verbose: Verbose = False,
) -> None:
    """Prepare a recipe's data in this process, and show what is trained: figures per source, and examples in text.

    `raymem data my.yaml --show 5` prints five examples, as `raymem data my.yaml 5` does. Targets are in colour, or
    between double square brackets where that cannot be. `raymem train` then uses what was prepared.
    """
    console.log_to_stderr(verbose)
    from raymem.recipe.load import load_recipe

    if split not in ("train", "eval"):
        raise RecipeError(f"--split {split}: a recipe has train and eval")
    from raymem.training.data.sources.early import check_files_are_here

    loaded = load_recipe(recipe, set_)
    check_files_are_here(loaded, ("eval",) if split == "eval" else ("train",))
    from raymem.runs.data import prepare_here
    from raymem.training.data import summary
    from raymem.training.data.tokenizer import load_tokenizer

    tokenizer, prepared = prepare_here(loaded, "eval" if split == "eval" else "train")
    sources = (loaded.data.train if split == "train" else loaded.data.eval) or []
    console.out.print(summary.table(summary.summarise(sources, prepared)), markup=False)
    shown = islice(summary.examples(prepared, load_tokenizer(tokenizer)), number if show else 0)
    for at, example in enumerate(shown, start=1):
        console.out.print(f"\n--- example {at} ---", markup=False)
        _print(example)


def _print(example: Sequence[Part]) -> None:
    from rich.text import Text

    from raymem.training.data.summary import plain

    if not console.out.is_terminal or console.out.color_system is None or os.environ.get("NO_COLOR"):
        console.out.print(plain(example), markup=False)
    else:
        console.out.print(Text.assemble(*((part.text, "green" if part.is_target else "dim") for part in example)))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(data)

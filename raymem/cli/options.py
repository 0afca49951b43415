"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="PATH=VALUE", help="Override a key, e.g. -s train.steps=100. Repeatable."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set an earlier run of this name aside and start over.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show what workers and libraries log.")]

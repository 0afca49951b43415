"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from raymem.errors import RecipeError
from raymem.storage.uris import CURE, secret_in

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="PATH=VALUE", help="Override a key, e.g. -s train.steps=100. Repeatable."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set an earlier run of this name aside and start over.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show what workers and libraries log.")]

_ADDRESS = re.compile(r"(?:--?[\w-]+=)?(?:[\w.\[\]-]+=)?[A-Za-z][\w+.-]*://\S+")
_TEXT_AFTER = ("--prompt", "-p", "--system")


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Look at a command line before any of it is shown; texts that are no addresses, such as prompts, are left alone.

    Raises:
        RecipeError: an address in it holds a password, user or token, which is not repeated.
    """
    for number, (before, word) in enumerate(zip(["", *arguments], arguments, strict=False), 1):
        if before in _TEXT_AFTER or not _ADDRESS.fullmatch(word):
            continue
        if found := secret_in(word):
            key, equals, _ = word.partition("=")
            name = " ".join(filter(None, [before if before.startswith("-") else "", key if equals else ""]))
            where = name if name and not secret_in(name) else f"argument {number}"
            raise RecipeError(f"{where}: {found} would be visible in logs and in the list of processes; {CURE}")

"""Checks the command of a job and its arguments, for ``raymem submit`` and ``raymem k8s render``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from raymem.recipe.schema import Recipe

Arguments = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="-- ARGUMENT", help="What else the command takes, e.g. -- --force.", show_default=False),
]


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of a command into overrides and others."""
    overrides: list[str] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("--set", "-s") and rest:
            overrides.append(rest.pop(0))
        elif word.startswith("--set="):
            overrides.append(word.removeprefix("--set="))
        elif word.startswith("-s") and len(word) > 2:
            overrides.append(word[2:])
        else:
            others.append(word)
    return overrides, others


def parse_command(context: typer.Context, command: str, recipe: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Parse the parameters of a command as the job will: a wrong option is wrong usage here already."""
    parser: Any = context.find_root().command
    for word in command.split():
        parser = parser.commands[word]
    parsed: Any = parser.make_context(f"raymem {command}", [str(recipe), *arguments])
    return dict(parsed.params)


def check_sweep(loaded: Recipe, options: dict[str, Any], root: Path) -> str | None:
    """Refuse what ``raymem sweep`` would refuse about its options.

    Args:
        root: Directory in which the job will look for files.

    Returns:
        The file of the space, if it is a relative one, which has to travel with the job.

    Raises:
        RaymemError: an option that no sweep can work with.
    """
    from raymem.cli.sweep import options_of

    known = {key: value for key, value in options.items() if key not in ("recipe", "set_", "fresh", "verbose")}
    space = options["space"]
    is_file = space is not None and Path(space).suffix != ""
    if is_file and Path(space).is_absolute() and not Path(space).exists():
        return None  # of the cluster's machines, which the job will look at
    options_of(loaded, **known | ({"space": str(root / space)} if is_file else {}))
    return space if is_file and not Path(space).is_absolute() else None

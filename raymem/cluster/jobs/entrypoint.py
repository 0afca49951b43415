"""Builds the command that the driver of a job runs: one of raymem's own, which every installation brings along."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from raymem.errors import ClusterError
from raymem.recipe.axes import BASES
from raymem.recipe.schema import Recipe
from raymem.recipe.sentences import nearest

COMMANDS = (
    "train",
    "sweep",
    "evaluate",
    "loram run",
    "loram prune",
    "loram align",
    "loram train",
    "loram recover",
    "loram verify",
    "loram evaluate",
)
"""The commands that take a recipe and work on a cluster."""


def usual_command(recipe: Recipe) -> str:
    """Return the usual command, which runs a recipe from its data to its result, such as ``train``."""
    return BASES.of(recipe).command


def check_command(command: str) -> str:
    """Return the command, if a job can run it. Raises ClusterError."""
    words = " ".join(command.split())
    if words not in COMMANDS:
        raise ClusterError(f"--command {command}: no command that a job can run{nearest(words, COMMANDS)}")
    return words


def entrypoint(command: str, recipe: str, overrides: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
    """Return the command line of the driver, for a shell.

    Args:
        recipe: Its file, as the driver sees it.
        overrides: ``a.b=value``, passed on as ``--set``.
        arguments: Whatever else the command takes.

    Raises:
        ClusterError: no such command.
    """
    sets = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["python", "-m", "raymem", *check_command(command).split(), recipe, *sets, *arguments])


def entrypoint_of_attempts(command: str, recipe: str, arguments: Sequence[str] = ()) -> str:
    """Return the command line of a driver that is started again when it fails.

    Raises:
        ClusterError: no such command, or it would not go on from the attempt before.
    """
    if "--fresh" in arguments:
        raise ClusterError(
            "--fresh: each attempt of a RayJob would start over, and lose what the one before it trained; give the run "
            "another name (--set name=...)"
        )
    return entrypoint(command, recipe, (), arguments)

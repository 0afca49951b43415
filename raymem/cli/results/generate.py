"""``raymem generate``: text from what a run left."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from raymem.cli import console


def generate(
    artifact: Annotated[str, typer.Argument(help="Adapter or model directory of a run.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Continue a text with what a run left."""
    console.log_to_stderr(False)
    from raymem.runs.artifacts import local_copy
    from raymem.training.artifacts import load

    text = sys.stdin.read() if prompt == "-" else prompt
    with local_copy(artifact) as directory:
        typer.echo(load.generate(directory, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(generate)

"""``raymem push``: uploads a result to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from raymem.cli import console


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(push)


def push(
    artifact: Annotated[str, typer.Argument(help="Adapter or model directory, here or on s3:// or gs://.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub, owner/name; made if it does not exist.")],
    private: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--private/--public", help="Of a new repository; default: as the owner's settings say."),
    ] = None,
    message: Annotated[Optional[str], typer.Option("--message", "-m", help="Of the commit.")] = None,  # noqa: UP045
) -> None:
    """Upload an adapter or a model to the Hugging Face hub, with its card."""
    console.log_to_stderr(False)
    from raymem.runs.artifacts import local_copy
    from raymem.training.artifacts.hub import check_push
    from raymem.training.artifacts.hub import push as upload

    check_push(repo)
    address = upload(Path(local_copy(artifact)), repo, private=private, message=message)
    console.out.print(f"pushed: {address}", markup=False)

"""``raymem export``: hands an adapter to a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from raymem.cli import console

SERVERS = ("vllm", "ray-serve")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(export)


def export(
    adapter: Annotated[str, typer.Argument(help="PEFT directory of a run.")],
    server: Annotated[str, typer.Option("--for", "--check", help="Server: vllm or ray-serve.")] = "vllm",
    allow_lm_head: Annotated[bool, typer.Option("--allow-lm-head", help="The server adapts output heads.")] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="vllm: also copy it to this directory; ray-serve: write the config there."),
    ] = None,
    loras: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="ray-serve: s3:// or gs:// folder of adapters; this one is uploaded below it."),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="ray-serve: name of the adapter there; default: the run's."),
    ] = None,
) -> None:
    """Check that a server takes an adapter, and print the command that serves it.

    With --for ray-serve the adapter is uploaded to where Ray Serve LLM loads adapters from, and its config is written.
    """
    console.log_to_stderr(False)
    from raymem.errors import ModelError, RecipeError
    from raymem.runs.artifacts import local_copy
    from raymem.training.artifacts import vllm

    if server not in SERVERS:
        raise RecipeError(f"--for {server}: its rules are not known; {' and '.join(SERVERS)} are")
    for option, value in (("--loras", loras), ("--name", name)):
        if server == "vllm" and value is not None:
            raise RecipeError(f"{option} goes with --for ray-serve; leave it out")
    if server == "ray-serve" and (loras is None or output is None):
        raise RecipeError(
            "--for ray-serve needs --loras s3://BUCKET/FOLDER, where adapters lie, and -o FILE for the config; add both"
        )
    directory = local_copy(adapter)
    linted = vllm.lint_vllm(directory, allow_lm_head=allow_lm_head, served_as=str(output or adapter))
    if linted.problems:
        raise ModelError("\n".join(f"{adapter}: {problem}" for problem in linted.problems))
    if server == "vllm":
        if output is not None:
            vllm.copy_adapter(directory, output)
        console.out.print(f"vLLM takes it:\n{linted.command}")
        return
    assert loras is not None and output is not None
    _to_ray_serve(Path(directory), adapter, loras, name, output)


def _to_ray_serve(directory: Path, origin: str, loras: str, name: str | None, output: Path) -> None:
    import shlex

    from raymem.errors import StorageError
    from raymem.recipe.yaml_text import write
    from raymem.storage.safetensors_io import atomic_file
    from raymem.training.artifacts.ray_serve import plain, serve_config, upload

    text = write(serve_config(directory, loras))
    if output.exists() and output.read_text() != text:
        raise StorageError(f"-o: {output} exists with another config; choose another file, or remove it")
    model = upload(directory, loras, name, origin=origin)
    with atomic_file(output) as stream:
        stream.write(text.encode())
    say = console.out.print
    say(f"uploaded to {plain(loras)}/{model.partition(':')[2]}", markup=False)
    say(f"serve it: serve deploy {shlex.quote(str(output))}", markup=False)
    say(f"clients ask for the model {model}", markup=False)

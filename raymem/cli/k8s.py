"""``raymem k8s``: manifests for Kubernetes. Heavy imports happen inside commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from raymem.cli import console
from raymem.cli.jobs import Arguments, check_sweep, parse_command, split_overrides
from raymem.cli.options import Overrides, RecipeFile
from raymem.errors import ClusterError
from raymem.memory.budget import bytes_text

app = typer.Typer(help="Kubernetes manifests (KubeRay) for a recipe.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Kubernetes manifests (KubeRay) for a recipe."""


@app.command()
def render(
    context: typer.Context,
    recipe: RecipeFile,
    arguments: Arguments = None,
    overlay: Annotated[
        str,
        typer.Option(
            help="cpu-demo, gpu, gpu-spot-elastic, kueue, kueue-elastic, loram, sweep, interactive (a cluster that "
            "stays, and no job) or scheduled-evaluation."
        ),
    ] = "gpu",
    workers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Number of workers, or min-max for gpu-spot-elastic, kueue-elastic and interactive. Default: the "
            "recipe's."
        ),
    ] = None,
    gpu: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="H100, A100, A100-40GB, L4, T4 or H200; checked against what a worker needs."),
    ] = None,
    image: Annotated[Optional[str], typer.Option(help="Your image, with its tag.")] = None,  # noqa: UP045
    name: Annotated[Optional[str], typer.Option(help="Of the RayJob. Default: the recipe's.")] = None,  # noqa: UP045
    namespace: Annotated[str, typer.Option(help="Of everything that is rendered.")] = "raymem",
    storage_class: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the shared volume; it must offer ReadWriteMany. Default: shared-rwx."),
    ] = None,
    command: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="What to run: train, sweep, evaluate, 'loram run' or another stage of LoRAM. Default: the overlay's, "
            "'loram run' for base: loram, else train."
        ),
    ] = None,
    cpus: Annotated[Optional[int], typer.Option(min=1, help="CPU cores of a worker.")] = None,  # noqa: UP045
    worker_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What a worker needs, e.g. 40Gi. Default: worked out from the recipe."),
    ] = None,
    model_config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="config.json of the model, to work that out where it cannot be downloaded here."),
    ] = None,
    node_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Memory of your nodes, e.g. 64Gi: a request that cannot fit is refused."),
    ] = None,
    only_job: Annotated[
        bool, typer.Option("--only-job", help="Without storage, tracking and network policies.")
    ] = False,
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Print manifests that train a recipe; nothing is applied.

    Options of the command itself go behind --, for example: raymem k8s render my.yaml -- --force
    """
    console.hush_libraries()
    more, others = split_overrides(arguments or [])
    overrides = [*set_, *more]
    from raymem.cluster.jobs.entrypoint import check_command
    from raymem.k8s.render import command_of
    from raymem.k8s.render import render as make
    from raymem.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    command = command_of(overlay, command, loaded)
    if command is None and others:
        raise ClusterError(f"-- {' '.join(others)}: overlay {overlay} runs no command that would take it; leave it out")
    command = command if command is None else check_command(command)
    options = {} if command is None else parse_command(context, command, recipe, others)
    if command == "sweep" and (space := check_sweep(loaded, options, Path())):
        raise ClusterError(
            f"--space {space}: is a file of this machine, which the Pods do not see; write the space into the recipe's "
            "`space` section"
        )
    rendered = make(
        recipe,
        overlay=overlay,
        overrides=overrides,
        workers=workers,
        gpu=gpu,
        image=image,
        name=name,
        namespace=namespace,
        storage_class=storage_class,
        command=command,
        arguments=others,
        cpus=cpus,
        worker_memory=worker_memory,
        model_config=model_config,
        node_memory=node_memory,
        only_job=only_job,
    )
    typer.echo(rendered.manifests, nl=False)
    console.err.print(
        f"{rendered.kind} {rendered.name}: a worker needs about {bytes_text(rendered.figure_bytes)}, its Pod asks for "
        f"{bytes_text(rendered.request_bytes)}; next: kubectl apply -f - (docs/kubernetes.md)"
    )
    if loaded.model.code_note is not None:
        console.err.print(f"note: {loaded.model.code_note}", markup=False)

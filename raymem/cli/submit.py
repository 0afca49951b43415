"""``raymem submit``: a recipe as a job of a Ray cluster. Heavy imports happen inside commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from raymem.cli import console
from raymem.cli.jobs import Arguments, check_sweep, parse_command, split_overrides
from raymem.cli.options import Overrides, RecipeFile


def submit(
    context: typer.Context,
    recipe: RecipeFile,
    arguments: Arguments = None,
    command: Annotated[
        str, typer.Option(help="What to run: train, sweep, evaluate, 'loram run' or another stage of LoRAM.")
    ] = "train",
    set_: Overrides = [],  # noqa: B006
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Dashboard of the cluster, http://head:8265. Default: RAY_API_SERVER_ADDRESS."),
    ] = None,
    working_dir: Annotated[Path, typer.Option(help="Directory to upload; the recipe lies in it.")] = Path(),
    follow: Annotated[bool, typer.Option(help="Print the job's output until it ends.")] = True,
    status: Annotated[bool, typer.Option("--status", help="Only say how the run's last job is doing.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Only stop the run's job; submitting again resumes.")] = False,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Only have the run's job save a checkpoint, and go on.")
    ] = False,
    submission_id: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--id", help="Submission id. Default: raymem-<name of the run>."),
    ] = None,
    env: Annotated[list[str], typer.Option(help="Variable that the job gets too; no secrets. Repeatable.")] = [],  # noqa: B006
    allow_remote_code: Annotated[
        bool, typer.Option("--allow-remote-code", help="Send a recipe with model.trust_remote_code: true.")
    ] = False,
) -> None:
    """Send a recipe to a Ray cluster as a job; the same run is never started twice.

    Options of the command itself go behind --, for example: raymem submit my.yaml -- --force, or
    raymem submit my.yaml --command sweep -- --space joint --budget 24GiB
    """
    console.log_to_stderr(False)
    if status + stop + checkpoint > 1:
        raise typer.BadParameter("give one of --status, --stop and --checkpoint")
    more, others = split_overrides(arguments or [])
    overrides = [*set_, *more]
    from raymem.cluster.jobs import submit as jobs
    from raymem.cluster.jobs.entrypoint import check_command
    from raymem.recipe.load import load_recipe

    command = check_command(command)
    options = parse_command(context, command, recipe, others)
    loaded = load_recipe(recipe, overrides)
    run = loaded.name
    if command == "sweep":
        from raymem.sweeps.options import sweep_name

        run = sweep_name(loaded, options["name"])
    if checkpoint:
        from raymem.cluster.jobs.checkpoint import save

        job = submission_id or jobs.last_job(run, address)
        console.out.print(f"{job}: {save(job, address, loaded.scaling)}; training goes on", markup=False)
        return
    if status or stop:
        job = submission_id or jobs.last_job(run, address)
        state = jobs.stop(job, address) if stop else jobs.status(job, address)
        console.out.print(f"{state.submission_id}: {state.status}", markup=False)
        if state.status == "FAILED":
            console.err.print(state.message, markup=False)
            raise typer.Exit(1)
        return
    space = check_sweep(loaded, options, working_dir) if command == "sweep" else None
    sent = jobs.submit(
        recipe,
        command=command,
        arguments=others,
        files=[space] if space else [],
        run=run,
        overrides=overrides,
        address=address,
        working_dir=working_dir,
        submission_id=submission_id,
        follow=follow,
        env_passthrough=env,
        allow_remote_code=allow_remote_code,
    )
    if not follow:
        word = "already running as" if sent.attached else "submitted as"
        console.out.print(
            f"{word} {sent.submission_id}\n"
            f"next: raymem submit {recipe} --id {sent.submission_id} --status (or --checkpoint, --stop)"
        )
    if sent.exit_code:
        raise typer.Exit(sent.exit_code)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(submit)

"""The ``raymem`` command. Heavy imports happen inside commands, so that help answers at once."""

from __future__ import annotations

import gc
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from raymem import __version__
from raymem.cli import console, data, init, k8s, loram, plan, report, signals, submit, sweep, threads
from raymem.cli.options import Fresh, Overrides, RecipeFile, Verbose, refuse_secrets
from raymem.cli.results import chat, evaluate, export, generate, push
from raymem.cli.signals import goes_on, unwind_on_signals
from raymem.errors import RaymemError
from raymem.memory.budget import bytes_text
from raymem.storage.errors import refusal

app = typer.Typer(
    help="Fine-tune large language models inside a memory budget, on a Ray cluster or on this machine.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(k8s.app, name="k8s")
app.add_typer(loram.app, name="loram")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"raymem {__version__}")
        raise typer.Exit


@app.command()
def train(
    recipe: RecipeFile,
    set_: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    force: Annotated[bool, typer.Option("--force", help="Train even if it is predicted not to fit.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train a recipe; a run of the same name on the same storage is resumed."""
    console.log_to_stderr(verbose)
    from raymem.recipe.load import load_recipe
    from raymem.training.data.sources.early import check_files_are_here

    loaded = load_recipe(recipe, set_)  # before the slow imports: a typo is answered at once
    check_files_are_here(loaded)
    if loaded.scaling.num_workers == 0:
        threads.spin_on_quiet_cores()

    with goes_on("the same command resumes from the last checkpoint"):
        from raymem.runs.train import launch

        with console.TrainingDisplay() as display:
            finished = launch(
                loaded, fresh=fresh, force=force, listeners=[display.show], status=display.status, begin=display.begin,
                source=recipe,
            )  # fmt: skip
    outcome, tracking = finished.outcome, finished.tracking
    say = console.out.print
    if outcome.loss is None:
        say(f"run {loaded.name!r} was already complete at step {outcome.steps}; raise train.steps or use --fresh")
    else:
        resumed = f" (resumed at {outcome.started_at})" if outcome.started_at else ""
        say(f"trained {outcome.steps} steps{resumed}: loss {outcome.loss:.4f}")
    if outcome.eval_loss is not None:
        say(f"evaluation: loss {outcome.eval_loss:.4f}, perplexity {outcome.eval_perplexity:.2f}")
    for name, score in finished.scores.items():
        say(f"answers: {name} {score:.4f}", markup=False)
    if outcome.peak_bytes is not None:
        predicted = finished.predicted_peak_bytes
        beside = "" if predicted is None else f" (predicted: {bytes_text(predicted)})"
        say(f"peak memory of a worker: {bytes_text(outcome.peak_bytes)}{beside}")
    say(f"result: {outcome.artifact}")
    if finished.pushed is not None:
        say(f"pushed: {finished.pushed}", markup=False)
    for line in tracking.summary_lines():
        say(line)
    if tracking.problem:
        console.err.print(f"warning: {tracking.problem}")
    if tracking.hint:
        say(tracking.hint)
    if finished.recipe.data.eval is not None:
        overrides = (word for override in set_ for word in ("--set", override))
        say(f"evaluate it: {shlex.join(['raymem', 'evaluate', str(recipe), *overrides])}", markup=False)
    say(f"next: {generate.command(outcome.artifact, finished.suggestion, loaded.scaling)}", markup=False)


init.register(app)
data.register(app)
plan.register(app)
sweep.register(app)
report.register(app)
evaluate.register(app)
generate.register(app)
chat.register(app)
export.register(app)
push.register(app)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="PEFT directory of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
) -> None:
    """Fold an adapter into its base and write the full model."""
    console.log_to_stderr(False)
    from raymem.runs.artifacts import local_copy
    from raymem.training.artifacts import merge as merging

    console.out.print(f"wrote {merging.merge(local_copy(adapter), output)}")


@app.command()
def doctor(
    recipe: Annotated[Optional[Path], typer.Argument(metavar="[RECIPE]", help="Also check what it needs.")] = None,  # noqa: UP045
    set_: Overrides = [],  # noqa: B006
    address: Annotated[Optional[str], typer.Option(help="Ray cluster to look at.")] = None,  # noqa: UP045
) -> None:
    """Check versions, devices, storage, Ray and tracking, and say how to mend what is wrong."""
    console.log_to_stderr(False)
    from raymem.cluster.doctor.checks import run_doctor
    from raymem.recipe.load import load_recipe

    checks = run_doctor(load_recipe(recipe, set_) if recipe else None, address=address)
    console.out.print(console.checks_table([(c.name, c.ok, c.detail, c.cure) for c in checks]))
    if any(c.ok is False for c in checks):
        raise typer.Exit(1)


@app.command("demo-data")
def demo_data(
    storage: Annotated[Path, typer.Option(help="Storage path of the recipes that will use it.")] = Path("raymem-runs"),
) -> None:
    """Build the demo corpus and tokenizer from this Python's standard library (recipes do so on their own)."""
    console.log_to_stderr(False)
    from raymem.training.data.demo import ensure_demo

    paths = ensure_demo(storage.resolve() / "cache")
    console.out.print(f"corpus and tokenizer: {paths.directory}")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors and validators."""
    from raymem.recipe.axes import problems
    from raymem.recipe.load import recipe_schema

    for problem in problems():
        console.err.print(f"left out: {problem}", markup=False)
    typer.echo(json.dumps(recipe_schema(), indent=2))


submit.register(app)


def run_app(*arguments: Any) -> int:
    """Run the command line; errors for the user become one line each on stderr.

    Returns:
        Exit status: 0, 1 for an error, 2 for wrong usage, 128 + number for a signal.
    """
    threads.sleep_while_waiting()
    try:
        refuse_secrets([str(a) for a in arguments] or sys.argv[1:])
        app(args=[str(a) for a in arguments] or None, standalone_mode=True)
    except RaymemError as error:
        for line in str(error).splitlines():
            console.err.print(f"error: {line}", markup=False)
        return 1
    except SystemExit as exit_:
        return signals.end(exit_)
    except Exception as error:
        if (sentence := refusal(error)) is None:
            raise
        console.err.print(f"error: {sentence}", markup=False)
        return 1
    return 0


def main() -> None:
    """Entry point of the ``raymem`` script."""
    unwind_on_signals()
    gc.set_threshold(10_000, 10, 10)  # looking for garbage was a sixth of the time that it takes to import libraries
    signals.leave(run_app())


if __name__ == "__main__":
    main()

"""``raymem evaluate``: the loss of what a run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from raymem.cli import console
from raymem.cli.options import Overrides, RecipeFile, Verbose
from raymem.cli.threads import spin_on_quiet_cores
from raymem.errors import RecipeError
from raymem.text import cut, printable

if TYPE_CHECKING:
    from raymem.recipe.schema import Recipe
    from raymem.runs.inference.tasks import Asked
    from raymem.training.predictions import Prediction

_SHOWN = 300
"""Characters of a text; of a longer one the middle is left out."""
_WIDTH = 100


def evaluate(
    recipe: RecipeFile,
    set_: Overrides = [],  # noqa: B006
    artifact: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="PEFT or model directory, or 'base'; by default the run's own result."),
    ] = None,
    predictions: Annotated[
        int, typer.Option(min=0, help="Evaluation examples that the model continues, to be read.")
    ] = 3,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Tasks of lm-evaluation-harness instead, with commas between: gsm8k,arc_easy."),
    ] = None,
    include_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="With --tasks: a directory with tasks of your own, in the harness's YAML."),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With --tasks: examples of each task; default: all."),
    ] = None,
    num_fewshot: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="With --tasks: examples in each prompt; default: as the task says."),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="With --tasks: ask in the tokenizer's chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Verbose = False,
) -> None:
    """Loss and perplexity on the recipe's evaluation data, and a few predictions beside the references.

    With --tasks the result answers tasks of lm-evaluation-harness instead (pip install 'raymem[eval]').

    A model that is too large for one device, or that workers share (scaling.strategy: fsdp2), is spread over them.
    """
    console.log_to_stderr(verbose)
    from raymem.recipe.load import load_recipe
    from raymem.training.data.sources.early import check_files_are_here

    loaded = load_recipe(recipe, set_)
    if tasks is not None:
        from raymem.runs.inference.tasks import Asked

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        _evaluate_tasks(loaded, artifact, Asked(names, include_path, limit, num_fewshot, apply_chat_template), as_json)
        return
    for option, value in {
        "--include-path": include_path, "--limit": limit, "--num-fewshot": num_fewshot,
        "--apply-chat-template": apply_chat_template or None,
    }.items():  # fmt: skip
        if value is not None:
            raise RecipeError(f"{option} goes with --tasks alone; add --tasks, or leave it out")
    check_files_are_here(loaded, ("eval",))
    if loaded.scaling.num_workers == 0:
        spin_on_quiet_cores()
    from raymem.runs.evaluate import evaluate_recipe

    result = evaluate_recipe(loaded, artifact, predictions=predictions, status=console.note)
    if as_json:
        shown = {"predictions": [one.to_dict() for one in result.predictions]} if predictions else {}
        figures = {"artifact": result.artifact, **result.result.metrics, "num_targets": result.num_targets}
        typer.echo(json.dumps({**figures, **shown}))
        return
    console.out.print(f"{result.artifact}")
    console.out.print(
        f"loss {result.loss:.4f}, perplexity {result.perplexity:.2f} over {result.num_targets} target tokens"
    )
    for name, part in result.result.by_name.items():
        console.out.print(
            f"  {name}: loss {part.loss:.4f}, perplexity {part.perplexity:.2f} over {part.num_targets} target tokens"
        )
    for score in result.result.scores:
        console.out.print(f"  {score.where}: {score.metric} {score.value:.4f} over {score.count} answers", markup=False)
    for number, prediction in enumerate(result.predictions, start=1):
        _print(number, prediction)


def _evaluate_tasks(recipe: Recipe, artifact: str | None, asked: Asked, as_json: bool) -> None:
    """Print a row for each metric of each task, or all as one JSON object."""
    from rich.table import Table

    from raymem.runs.inference.tasks import evaluate_tasks

    scores = evaluate_tasks(recipe, artifact, asked, console.note)
    if as_json:
        results: dict[str, dict[str, dict[str, float | None]]] = {}
        for score in scores:
            results.setdefault(score.task, {})[score.metric] = {"value": score.value, "stderr": score.stderr}
        typer.echo(json.dumps({"tasks": results}))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("task", "metric", "value", "stderr"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for score in scores:
        error = "" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(score.task, score.metric, f"{score.value:.4f}", error)
    console.out.print(table)


def _print(number: int, prediction: Prediction) -> None:
    """Print what the model read, wrote and was to write, one below the other, in lines that fit the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, width=min(console.out.width, _WIDTH))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in prediction.to_dict().items():
        table.add_row(name, Text(printable(cut(" ".join(text.split()), _SHOWN)) or "(nothing)"))
    console.out.print(f"\n--- prediction {number} ---", markup=False)
    console.out.print(table)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)

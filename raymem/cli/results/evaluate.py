"""``raymem evaluate``: the loss of what a run left."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from raymem.cli import console
from raymem.cli.options import Overrides, RecipeFile, Verbose


def evaluate(
    recipe: RecipeFile,
    set_: Overrides = [],  # noqa: B006
    artifact: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="PEFT or model directory, or 'base'; by default the run's own result."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Verbose = False,
) -> None:
    """Loss and perplexity on the recipe's evaluation data."""
    console.log_to_stderr(verbose)
    from raymem.recipe.load import load_recipe

    loaded = load_recipe(recipe, set_)
    from raymem.runs.evaluate import evaluate_recipe

    result = evaluate_recipe(loaded, artifact)
    if as_json:
        typer.echo(
            json.dumps({"artifact": result.artifact, **result.result.metrics, "num_targets": result.num_targets})
        )
        return
    console.out.print(f"{result.artifact}")
    console.out.print(
        f"loss {result.loss:.4f}, perplexity {result.perplexity:.2f} over {result.num_targets} target tokens"
    )
    for name, part in result.result.by_name.items():
        console.out.print(
            f"  {name}: loss {part.loss:.4f}, perplexity {part.perplexity:.2f} over {part.num_targets} target tokens"
        )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)

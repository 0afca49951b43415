"""``raymem plan``: will it fit, and where does the memory go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from raymem.cli import console
from raymem.cli.options import Overrides, RecipeFile
from raymem.errors import BudgetError, DataError

if TYPE_CHECKING:
    from raymem.memory.budget import Verdict
    from raymem.planner.advise import Advice
    from raymem.planner.types import Plan
    from raymem.recipe.schema import Recipe


def plan(
    recipe: RecipeFile,
    set_: Overrides = [],  # noqa: B006
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Memory of one worker's device, e.g. 24GiB; by default the recipe's budget."),
    ] = None,
    gpu: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Kind of GPU, e.g. H100-80GB: plan for it, with its memory as the budget."),
    ] = None,
    workers: Annotated[Optional[int], typer.Option(min=1, help="Plan for this many workers.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    advise: Annotated[bool, typer.Option("--advise", help="Look for changes that make it fit.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Write the timeline of a step as a picture (PNG).")] = None,  # noqa: UP045
) -> None:
    """Predict the peak memory of one worker, without its memory and without a GPU. Nothing is downloaded but configs.

    Exits with 1 if the recipe does not fit.
    """
    console.hush_libraries()
    from raymem.recipe.load import load_recipe
    from raymem.runs.plan import budget_bytes, plan_run

    overrides = [*set_, *([f"scaling.num_workers={workers}"] if workers else [])]
    loaded = load_recipe(recipe, overrides)
    _note_missing_data(loaded)
    if (note := loaded.model.code_note) is not None:
        console.err.print(note, markup=False)
    limit = budget_bytes(loaded, budget, gpu, where="--budget")
    loaded, prediction = plan_run(loaded, budget_bytes=limit, gpu=gpu, status=console.err.print)
    overrides.append(f"train.micro_batch={loaded.train.micro_batch}")  # if it is open: `auto`
    verdict = None if limit is None else prediction.verdict(limit)
    advice: list[Advice] | None = None
    if advise:
        if limit is None:
            raise BudgetError("--advise: there is nothing to fit into; give --budget 24GiB or --gpu H100-80GB")
        from raymem.memory.budget import Exceeds
        from raymem.planner import advise as adviser

        def load(more: Sequence[str]) -> Recipe:
            return load_recipe(recipe, [*overrides, *more])

        advice = adviser.advise(load, limit, gpu) if isinstance(verdict, Exceeds) else []
    if plot is not None:
        from raymem.planner.plot import draw

        draw(
            prediction,
            plot,
            f"{loaded.name}: one worker of {prediction.num_workers}, {gpu or prediction.device}",
            limit,
        )
    if as_json:
        typer.echo(json.dumps(as_dict(prediction, verdict, limit, advice)))
    else:
        _print(prediction, loaded, verdict, limit, advice)
        if plot is not None:
            console.out.print(f"picture: {plot}")
    if _exceeds(verdict):
        raise typer.Exit(1)


def _note_missing_data(recipe: Recipe) -> None:
    """Say what training would miss here: a plan needs no data, and may be made far from where they are."""
    from raymem.training.data.sources.early import check_files_are_here

    try:
        check_files_are_here(recipe)
    except DataError as error:
        console.err.print(f"note: {error} The plan needs no data, training does.", markup=False)


def as_dict(
    prediction: Plan, verdict: Verdict | None, limit: int | None, advice: Sequence[Advice] | None = None
) -> dict[str, Any]:
    """Return the JSON answer: ``<term>_bytes`` at the peak, totals, and the verdict."""
    facts = prediction.to_dict()
    terms = facts.pop("terms")
    result = {f"{name}_bytes": size for name, size in terms.items()} | facts | {"budget_bytes": limit}
    result["verdict"] = None if verdict is None else "exceeds" if _exceeds(verdict) else "fits"
    if verdict is not None:
        result |= dict(vars(verdict))
    if advice is not None:
        result["advice"] = [
            {"overrides": list(a.overrides), "peak_bytes": a.plan.peak_bytes, "capacity_bytes": a.plan.capacity_bytes}
            for a in advice
        ]
    return result


def _exceeds(verdict: Verdict | None) -> bool:
    from raymem.memory.budget import Exceeds

    return isinstance(verdict, Exceeds)


def _print(
    prediction: Plan, recipe: Recipe, verdict: Verdict | None, limit: int | None, advice: Sequence[Advice] | None
) -> None:
    from raymem.memory.budget import bytes_text

    say = console.out.print
    if not prediction.traced:
        say(f"[bold]rough figure by formulas[/bold]: the model's code could not be traced ({prediction.note})")
    console.print_whole(console.plan_table(prediction.terms, prediction.phases))
    if prediction.loss_note is not None:
        say(prediction.loss_note, markup=False)
    for line in prediction.trained:
        say(line, markup=False)
    say(f"peak of what is allocated: {bytes_text(prediction.peak_bytes)}")
    if prediction.term_peaks["loss"] > prediction.terms["loss"]:
        say(f"the loss has its own highest moment elsewhere: {bytes_text(prediction.term_peaks['loss'])}")
    if prediction.device == "cuda":
        say(
            f"reserved on an empty GPU: {bytes_text(prediction.reserved_bytes)} (expandable segments: "
            f"{bytes_text(prediction.expandable_bytes)})"
        )
        say(
            f"least memory of the GPU: {bytes_text(prediction.capacity_bytes)}, of which context and NCCL "
            f"{bytes_text(prediction.outside_bytes)}"
        )
    if prediction.top:
        say(console.holders_table([(t["name"], t["category"], t["operation"], t["bytes"], t["count"])
                                   for t in prediction.top[:8]]))  # fmt: skip
    from raymem.planner.prediction_error import ratio

    known = ratio(recipe)
    if known is not None:
        say(f"measured over predicted peak so far: {known[0]:.3f} (mean of {known[1]} runs of these methods)")
    if verdict is not None and limit is not None:
        say(verdict_text(verdict, limit))
    for number, one in enumerate(advice or (), start=1):
        text = " ".join(f"-s {override}" for override in one.overrides)
        say(f"  {number}. {text}   needs {bytes_text(one.plan.capacity_bytes)}", markup=False)
    if advice == [] and _exceeds(verdict):
        say("no combination of up to three changes fits; take a smaller model or more GPU memory")


def verdict_text(verdict: Verdict, limit: int) -> str:
    """Return the verdict as a sentence."""
    from raymem.memory.budget import Exceeds, bytes_text

    if isinstance(verdict, Exceeds):
        return (
            f"does not fit: {bytes_text(verdict.by_bytes)} above the budget of {bytes_text(limit)}; the largest term "
            f"is {verdict.largest_term}; what would help: {', '.join(verdict.would_help)}"
        )
    return f"fits: {bytes_text(verdict.headroom_bytes)} of {bytes_text(limit)} to spare"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)

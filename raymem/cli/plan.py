"""``raymem plan``: will it fit, and where does the memory go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from raymem.cli import console
from raymem.cli.options import Overrides, RecipeFile
from raymem.errors import BudgetError

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
    from raymem.planner.process import plan_recipe
    from raymem.recipe.load import load_recipe

    overrides = [*set_, *([f"scaling.num_workers={workers}"] if workers else [])]
    loaded = load_recipe(recipe, overrides)
    limit = budget_bytes(loaded, budget, gpu)
    if loaded.train.micro_batch == "auto":
        from raymem.planner.micro_batch import settle_micro_batch

        loaded = settle_micro_batch(loaded, budget_bytes=limit, gpu=gpu, status=console.err.print)
        overrides.append(f"train.micro_batch={loaded.train.micro_batch}")
    found = plan_recipe(loaded, gpu=gpu)
    judged = None if limit is None else found.verdict(limit)
    advice: list[Advice] | None = None
    if advise:
        if limit is None:
            raise BudgetError("--advise: there is nothing to fit into; give --budget 24GiB or --gpu H100-80GB")
        from raymem.memory.budget import Exceeds
        from raymem.planner import advise as adviser

        def load(more: Sequence[str]) -> Recipe:
            return load_recipe(recipe, [*overrides, *more])

        advice = adviser.advise(load, limit, gpu) if isinstance(judged, Exceeds) else []
    if plot is not None:
        from raymem.planner.plot import draw

        draw(found, plot, f"{loaded.name}: one worker of {found.num_workers}, {gpu or found.device}", limit)
    if as_json:
        typer.echo(json.dumps(as_dict(found, judged, limit, advice)))
    else:
        _print(found, loaded, judged, limit, advice)
        if plot is not None:
            console.out.print(f"picture: {plot}")
    if _exceeds(judged):
        raise typer.Exit(1)


def budget_bytes(recipe: Recipe, budget: str | None, gpu: str | None) -> int | None:
    """The budget that holds: of the option, of the GPU, or of the recipe.

    Raises:
        BudgetError: it cannot be read, or the GPU is unknown.
    """
    from raymem.memory.budget import parse_bytes
    from raymem.memory.devices import gpu_named

    known = None if gpu is None else gpu_named(gpu)
    if budget is not None:
        try:
            return parse_bytes(budget)
        except ValueError as error:
            raise BudgetError(f"--budget: {error}") from None
    if known is not None:
        return known.capacity_bytes
    return None if recipe.budget is None else parse_bytes(recipe.budget)


def as_dict(
    found: Plan, judged: Verdict | None, limit: int | None, advice: Sequence[Advice] | None = None
) -> dict[str, Any]:
    """The JSON answer: ``<term>_bytes`` at the peak, totals, and the verdict."""
    facts = found.to_dict()
    terms = facts.pop("terms")
    result = {f"{name}_bytes": size for name, size in terms.items()} | facts | {"budget_bytes": limit}
    result["verdict"] = None if judged is None else "exceeds" if _exceeds(judged) else "fits"
    if judged is not None:
        result |= dict(vars(judged))
    if advice is not None:
        result["advice"] = [
            {"overrides": list(a.overrides), "peak_bytes": a.plan.peak_bytes, "capacity_bytes": a.plan.capacity_bytes}
            for a in advice
        ]
    return result


def _exceeds(judged: Verdict | None) -> bool:
    from raymem.memory.budget import Exceeds

    return isinstance(judged, Exceeds)


def _print(
    found: Plan, recipe: Recipe, judged: Verdict | None, limit: int | None, advice: Sequence[Advice] | None
) -> None:
    from raymem.memory.budget import bytes_text

    say = console.out.print
    if not found.traced:
        say(f"[bold]rough figure by formulas[/bold]: the model's code could not be traced ({found.note})")
    console.print_whole(console.plan_table(found.terms, found.phases))
    if found.loss_note is not None:
        say(found.loss_note, markup=False)
    for line in found.trained:
        say(line, markup=False)
    say(f"peak of what is allocated: {bytes_text(found.peak_bytes)}")
    if found.term_peaks["loss"] > found.terms["loss"]:
        say(f"the loss has its own highest moment elsewhere: {bytes_text(found.term_peaks['loss'])}")
    if found.device == "cuda":
        say(
            f"reserved on an empty GPU: {bytes_text(found.reserved_bytes)} (expandable segments: "
            f"{bytes_text(found.expandable_bytes)})"
        )
        say(
            f"least memory of the GPU: {bytes_text(found.capacity_bytes)}, of which context and NCCL "
            f"{bytes_text(found.outside_bytes)}"
        )
    if found.top:
        say(console.holders_table([(t["name"], t["category"], t["operation"], t["bytes"], t["count"])
                                   for t in found.top[:8]]))  # fmt: skip
    from raymem.planner.prediction_error import ratio

    known = ratio(recipe)
    if known is not None:
        say(f"measured over predicted peak so far: {known[0]:.3f} (mean of {known[1]} runs of these methods)")
    if judged is not None and limit is not None:
        say(verdict_text(judged, limit))
    for number, one in enumerate(advice or (), start=1):
        text = " ".join(f"-s {override}" for override in one.overrides)
        say(f"  {number}. {text}   needs {bytes_text(one.plan.capacity_bytes)}", markup=False)
    if advice == [] and _exceeds(judged):
        say("no combination of up to three changes fits; take a smaller model or more GPU memory")


def verdict_text(judged: Verdict, limit: int) -> str:
    """The verdict as a sentence."""
    from raymem.memory.budget import Exceeds, bytes_text

    if isinstance(judged, Exceeds):
        return (
            f"does not fit: {bytes_text(judged.by_bytes)} above the budget of {bytes_text(limit)}; the largest term is "
            f"{judged.largest_term}; what would help: {', '.join(judged.would_help)}"
        )
    return f"fits: {bytes_text(judged.headroom_bytes)} of {bytes_text(limit)} to spare"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)

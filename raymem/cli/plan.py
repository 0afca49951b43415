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
    from rich.table import Table

    from raymem.memory.budget import Verdict
    from raymem.planner.advise import Tried
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
        typer.Option(help="Kind of GPU, e.g. h100 or 4090: plan for it, with its memory as the budget."),
    ] = None,
    workers: Annotated[Optional[int], typer.Option(min=1, help="Plan for this many workers.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    wide: Annotated[bool, typer.Option(help="Show all phases, and the operations behind what is held.")] = False,
    advise: Annotated[bool, typer.Option("--advise", help="Look for changes that make it fit.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Write the timeline of a step as a picture (PNG).")] = None,  # noqa: UP045
) -> None:
    """Predict the peak memory of one worker, without its memory and without a GPU. Nothing is downloaded but configs.

    Exits with 1 if the recipe does not fit.
    """
    console.hush_libraries()
    from raymem.memory.devices import gpu_key
    from raymem.recipe.load import load_recipe
    from raymem.runs.plan import budget_bytes, plan_run

    gpu = None if gpu is None else gpu_key(gpu)
    overrides = [*set_, *(["scaling.use_gpu=true"] if gpu else [])]
    overrides += [f"scaling.num_workers={workers}"] if workers else []
    loaded = load_recipe(recipe, overrides)
    _note_missing_data(loaded)
    if (note := loaded.model.code_note) is not None:
        console.err.print(note, markup=False)
    limit = budget_bytes(loaded, budget, gpu, where="--budget")
    if advise and limit is None:
        raise BudgetError("--advise: there is nothing to fit into; give --budget 24GiB or --gpu H100-80GB")
    loaded, prediction = plan_run(loaded, budget_bytes=limit, gpu=gpu, status=console.err.print)
    overrides.append(f"train.micro_batch={loaded.train.micro_batch}")  # if it is open: `auto`
    verdict = None if limit is None else prediction.verdict(limit, loaded)
    if not as_json:  # before the search for changes, which takes its time
        _print(prediction, loaded, verdict, limit, wide=wide)
    advice: list[Tried] | None = [] if advise else None
    if advise and limit is not None and _exceeds(verdict):
        from raymem.planner import advise as adviser

        def load(more: Sequence[str]) -> Recipe:
            return load_recipe(recipe, [*overrides, *more])

        def report(line: str) -> None:
            console.err.print(line, markup=False)

        report("looking for changes that make it fit")
        advice = adviser.advise(load, prediction, limit, gpu, report=report)
        if not as_json:
            _print_advice(advice)
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
    elif plot is not None:
        console.out.print(f"picture: {plot}", markup=False)
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
    prediction: Plan, verdict: Verdict | None, limit: int | None, advice: Sequence[Tried] | None = None
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
            {
                "overrides": list(one.overrides),
                "exact": one.is_exact,
                "time": {change.override: change.time for change in one.changes},
                "capacity_bytes": one.needed_bytes,
            }
            for one in advice
        ]
    return result


def _exceeds(verdict: Verdict | None) -> bool:
    from raymem.memory.budget import Exceeds

    return isinstance(verdict, Exceeds)


_NARROW = ("load", "forward", "backward", "step")
"""The phases of a table that is read in 80 columns; of the others only the sum is told."""


def _print(prediction: Plan, recipe: Recipe, verdict: Verdict | None, limit: int | None, *, wide: bool) -> None:
    from raymem.memory.budget import bytes_text

    say = console.out.print
    if not prediction.traced:
        say("[bold]rough figure by formulas[/bold]: the model's code could not be traced (", end="")
        say(f"{prediction.note})", markup=False)
    narrow = _NARROW[1:] if prediction.host_terms else _NARROW  # its column takes the place of one
    shown = {name: phase for name, phase in prediction.phases.items() if wide or name in narrow}
    console.print_whole(console.plan_table(prediction.terms, shown, prediction.host_terms))
    for name in [name for name in prediction.phases if name not in shown]:
        say(f"{name.replace('_', ' ')}: {bytes_text(prediction.phases[name]['peak_bytes'])} (--wide shows its terms)")
    if prediction.loss_note is not None:
        say(prediction.loss_note, markup=False)
    for line in prediction.trained:
        say(line, markup=False)
    say(f"peak of what is allocated: {bytes_text(prediction.peak_bytes)}")
    if prediction.host_bytes:
        place = "part of the peak, since a CPU has one memory" if prediction.device == "cpu" else "of each worker"
        say(f"memory of the host that the recipe moves tensors to: {bytes_text(prediction.host_bytes)}, {place}")
    if prediction.term_peaks["loss"] > prediction.terms["loss"]:
        say(f"the loss has its own highest moment elsewhere: {bytes_text(prediction.term_peaks['loss'])}")
    if prediction.device == "cuda":
        say(f"reserved on an empty GPU: {bytes_text(prediction.reserved_bytes)}")
        say(f"with expandable segments: {bytes_text(prediction.expandable_bytes)}")
        say(
            f"least memory of the GPU: {bytes_text(prediction.capacity_bytes)}, of which context and NCCL "
            f"{bytes_text(prediction.outside_bytes)}"
        )
    if prediction.top:
        console.print_whole(_holders(prediction, wide=wide))
    from raymem.planner.prediction_error import ratio

    known = ratio(recipe)
    if known is not None:
        say(f"measured over predicted peak so far: {known[0]:.3f} (mean of {known[1]} runs of these methods)")
    if verdict is not None and limit is not None:
        say(verdict_text(verdict, limit), markup=False)


def _holders(prediction: Plan, *, wide: bool) -> Table:
    rows = [(t["name"], t["category"], t["operation"], t["bytes"], t["count"]) for t in prediction.top[:8]]
    return console.holders_table(rows, wide=wide)


def _print_advice(advice: Sequence[Tried]) -> None:
    """Show the changes that make it fit: exact ones first, each with its cost."""
    from raymem.memory.budget import bytes_text

    say = console.out.print
    if not advice:
        say("no combination of up to three changes fits; take a smaller model or more GPU memory")
    for number, one in enumerate(advice, start=1):
        text = " ".join(f"-s {override}" for override in one.overrides)
        result = "same result" if one.is_exact else "approximate: the result changes"
        say(f"{number}. {text}", markup=False)
        say(f"   needs {bytes_text(one.needed_bytes)}; {result}")
        for change in one.changes:
            name = f"{change.override}: " if len(one.changes) > 1 else ""
            say(f"   {name}time: {change.time}", markup=False)


def verdict_text(verdict: Verdict, limit: int) -> str:
    """Return the verdict as a sentence."""
    from raymem.memory.budget import Exceeds, bytes_text

    if isinstance(verdict, Exceeds):
        cure = f"what would help: {', '.join(verdict.would_help)}" if verdict.would_help else "take a smaller model"
        return (
            f"does not fit: {bytes_text(verdict.by_bytes)} above the budget of {bytes_text(limit)}; the largest term "
            f"is {verdict.largest_term}; {cure}"
        )
    return f"fits: {bytes_text(verdict.headroom_bytes)} of {bytes_text(limit)} to spare"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)

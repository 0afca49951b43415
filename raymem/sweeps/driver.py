"""Drives a sweep: Ray Tune over the points that fit, one journal, one report."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from raymem.errors import BudgetError, BudgetExceeded, RaymemError, RecipeError
from raymem.memory.budget import bytes_text
from raymem.planner.admission import AdmissionController
from raymem.recipe.schema import ModelSection, Recipe
from raymem.recipe.space import AXES, Space, sample
from raymem.recipe.space_load import recipe_at
from raymem.runs.backend import Backend
from raymem.runs.lock import only_one, set_aside
from raymem.runs.prepare import prepare_data
from raymem.runs.resolve import resolve_shared
from raymem.runs.train import build_demo
from raymem.storage.identity import identify
from raymem.storage.storage import Storage
from raymem.storage.unfinished import temporary
from raymem.sweeps.journal import open_study
from raymem.sweeps.options import Objective, SweepOptions, check_metrics, trial_name
from raymem.sweeps.report import BEST, REPORT, TABLE, SweepRow, best_of, rows_of, write_report
from raymem.sweeps.resources import admitted_bytes, resources_of
from raymem.sweeps.result import SweepResult
from raymem.sweeps.search import BudgetedSearch, Configure, started
from raymem.sweeps.trial import TrialJob
from raymem.sweeps.tune import early_stopping, tune
from raymem.tracking import RunStart, Tracker, start_tracking
from raymem.training.data.sources.early import check_files_are_here
from raymem.training.model.revision import Began
from raymem.training.reporter import Status

log = logging.getLogger(__name__)

_FACTS = "sweep.json"
Watch = Callable[[list[SweepRow]], None]
"""A function that is told all rows whenever one has changed; trials to be gone on with are ``waiting``."""


def sweep(
    recipe: Recipe, space: Space, options: SweepOptions, *,
    fresh: bool = False, status: Status = log.info, watch: Watch = lambda rows: None,
) -> SweepResult:  # fmt: skip
    """Search a space under a budget; a sweep of the same name on the same storage goes on.

    Args:
        recipe: what every trial starts from; its name is the sweep's.

    Raises:
        BudgetExceeded: nothing in the space fits; names the smallest figure.
        RaymemError: whatever makes every trial impossible.
    """
    storage = _check(recipe, options)
    from raymem.cluster.backend import RayBackend

    with only_one(storage, recipe.name), temporary("sweep") as copy:
        backend = RayBackend(recipe.scaling.model_copy(update={"num_workers": 0}))  # trials bring their own workers
        backend.connect(storage, status)
        if fresh:
            set_aside(storage, recipe.name)
        folder = storage.child(recipe.name)
        resumed, facts = _same_sweep(folder, recipe, space, options)
        recipe = _prepare(recipe, facts, storage, backend, status)
        folder.write_record(_FACTS, facts | {"revision": recipe.model.revision})
        tracker = _start_tracking(recipe, options, storage, resumed=resumed)
        report = Path(copy, REPORT)
        try:
            named = partial(trial_name, recipe.name, facts["key"])
            storage_id = identify(Path(storage.root)) if storage.is_local else None
            configure = _configurer(named, tracker.run_id, storage_id, list(space), options.objective)
            search, rows = _search(recipe, space, options, report, configure, storage, status, watch)
            if (best := best_of(rows, options.objective)) is not None:
                tracker.log([{"step": best.number, **{f"best_{name}": v for name, v in best.metrics.items()}}])
        except BaseException as error:
            killed = not isinstance(error, Exception)  # Ctrl-C, or SIGTERM
            tracker.finish("KILLED" if killed else "FAILED", {"sweep": report} if report.is_dir() else {})
            raise
        tracking = tracker.finish("FINISHED", {"sweep": report})
        best_recipe = None if best is None else folder.join(REPORT, BEST)
        table = (report / TABLE).read_text()
        return SweepResult(folder.path, folder.join(REPORT), best_recipe, table, rows, search.gave_up, tracking)


def _check(recipe: Recipe, options: SweepOptions) -> Storage:
    """Return the recipe's storage, if the recipe can be swept.

    Raises:
        RaymemError: names what is in the way.
    """
    spelling = options.spelling
    check_metrics(options.objective, recipe, spelling)
    check_files_are_here(recipe)
    if recipe.data.eval is None and "eval_loss" in options.objective.metrics:
        raise RecipeError(
            f"objective 'eval_loss': the recipe has no data.eval; add it, or use {spelling('metrics', 'loss')}"
        )
    if options.gpu is not None and not recipe.scaling.use_gpu:
        raise BudgetError(
            f"{spelling('gpu', options.gpu)}: scaling.use_gpu is false, so trials would run on CPU; set "
            f"scaling.use_gpu: true, or give {spelling('budget')} alone"
        )
    return recipe.storage.open()


def _start_tracking(recipe: Recipe, options: SweepOptions, storage: Storage, *, resumed: bool) -> Tracker:
    """Open the sweep's own tracked run, whose children are the trials."""
    tags = {"raymem.sweep": recipe.name, "raymem.budget": bytes_text(options.budget_bytes)}
    device = "cuda" if recipe.scaling.use_gpu else "cpu"
    return start_tracking(RunStart(recipe.to_dict(), storage.path, resumed, device, tags=tags))


def _search(
    recipe: Recipe, space: Space, options: SweepOptions, report: Path, configure: Configure, storage: Storage,
    status: Status, watch: Watch,
) -> tuple[BudgetedSearch, list[SweepRow]]:  # fmt: skip
    """Run trials until the search has ended; the report is written however it ends.

    Args:
        report: local directory for the report, which is then copied into the storage.

    Raises:
        BudgetExceeded, RecipeError: no point of the space could be started.
    """
    folder = storage.child(recipe.name)
    study = open_study(folder, options.objective, recipe.name)

    def trials() -> list[FrozenTrial]:
        return study.get_trials(deepcopy=False)

    admitted = admitted_bytes(recipe, options.budget_bytes, status)
    with AdmissionController(admitted, gpu=options.gpu) as gate:
        if sum(map(started, trials())) < options.samples:
            status("starting the planner")
            gate.warm_up(recipe)
        status(f"searching {len(space)} dimensions under {bytes_text(options.budget_bytes)}")
        try:
            search = tune(
                lambda: BudgetedSearch(
                    study, space, recipe, gate, options.objective,
                    algorithm=options.algorithm, samples=options.samples, configure=configure,
                ),
                recipe, storage, admitted,
                early_stopping(recipe, options.objective) if options.early_stopping else None,
                lambda running: watch(_as_they_are(rows_of(trials()), running)),
            )  # fmt: skip
        finally:
            rows = write_report(report, trials(), recipe, options.objective, options.budget_bytes)
            folder.upload_dir(report, REPORT, last=None)
        if not any(row.status != "refused" for row in rows):
            raise _nothing_fits(space, recipe, gate, rows)
    return search, rows


def _as_they_are(rows: list[SweepRow], running: Collection[int]) -> list[SweepRow]:
    """Tell trials that run from those that an earlier driver left, which wait until there is room."""
    return [
        replace(row, status="waiting") if row.status == "running" and row.number not in running else row for row in rows
    ]


def _same_sweep(
    folder: Storage, recipe: Recipe, space: Space, options: SweepOptions
) -> tuple[bool, dict[str, Any]]:  # fmt: skip
    """Say whether this sweep was begun before, and return its facts; another one of the same name is refused.

    Besides the search itself, the facts have a ``key`` that is in the trials' names, so that a sweep that starts over
    does not find the trials of the one that it replaces; and the ``revision`` of the model, once it is known.

    Raises:
        RecipeError: names what differs.
    """
    plain = recipe.to_dict()
    now = {
        **{section: plain[section] for section in ("seed", "model", "data", *AXES, "train", "scaling")},
        "space": {path: dimension.model_dump(mode="json") for path, dimension in space.items()},
        "budget": options.budget_bytes,
        "objective": list(options.objective.metrics),
        "algorithm": options.algorithm,
    }
    if not folder.exists(_FACTS):
        facts = {**now, "key": secrets.token_hex(2), "revision": None}
        folder.write_record(_FACTS, facts)
        return False, facts
    cure = f"start over with {options.spelling('fresh', True)}"
    before = folder.read_record(_FACTS, {"model": (dict,), "key": (str,)}, cure=cure)
    if _began(before).is_meant_by(recipe.model):
        now["model"] = {**now["model"], "revision": before["model"].get("revision")}
    if different := [name for name in now if now[name] != before.get(name)]:
        raise RecipeError(
            f"{folder.path}: a sweep of this name with another {', '.join(different)} lies there; choose another "
            f"{options.spelling('name')}, or start over with {options.spelling('fresh', True)}"
        )
    return True, {"revision": None, **before}


def _began(facts: dict[str, Any]) -> Began:
    return Began(facts["model"].get("name"), facts.get("revision"), facts["model"].get("revision"))


def _prepare(recipe: Recipe, facts: dict[str, Any], storage: Storage, backend: Backend, status: Status) -> Recipe:
    """Make once what every trial needs, its model and its data; returns the recipe at the sweep's revision."""
    asked = recipe.model_copy(update={"model": ModelSection.model_validate(facts["model"])})
    began = _began(facts)
    build = partial(build_demo, status=status)
    pinned, named, tokenizer = resolve_shared(asked, began if began.commit else None, storage, build, status)
    status("preparing the data")
    prepare_data(named.data, "train", tokenizer, storage, backend, status)
    if named.data.eval is not None:
        prepare_data(named.data, "eval", tokenizer, storage, backend, status)
    return pinned


def _configurer(
    named: Callable[[int], str], parent_run_id: str | None, storage_id: str | None, paths: Sequence[str],
    objective: Objective,
) -> Configure:  # fmt: skip
    """Return the function that makes a trial's config.

    Args:
        paths: the dimensions of the space.
    """

    def configure(number: int, point: Recipe, predicted_bytes: int, needed_bytes: int) -> dict[str, Any]:
        scaling, resources, memory, threads = resources_of(point, needed_bytes)
        plain = point.to_dict() | {"name": named(number), "scaling": scaling, "budget": None}
        plain["train"] |= {"score_every": None}  # of a trial only the result is judged, if the sweep looks for that
        chosen = {path: value for path in paths if (value := _at(plain, path)) is not None}
        job = TrialJob(
            number, plain, predicted_bytes, memory, threads, resources, parent_run_id, storage_id, chosen,
            objective.has_scores,
        )  # fmt: skip
        return job.to_config()

    return configure


def _at(values: Any, path: str) -> Any:
    """Return what a recipe has at a path; None where its kinds have no such option."""
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _nothing_fits(space: Space, recipe: Recipe, gate: AdmissionController, rows: list[SweepRow]) -> RaymemError:
    """Build the error of a sweep in which no trial was started, with the least that any point needs."""
    sized = [(row.predicted_bytes, row.point) for row in rows if row.predicted_bytes is not None]
    if not sized:
        problem = rows[-1].problem if rows else "the space has no point"
        return RecipeError(f"no point of the space can be trained; the last one: {problem}")
    at_least, point = min(sized, key=lambda size_and_point: size_and_point[0])
    needed: int | None = None
    for _ in range(2):  # from the smallest proposal along one dimension after the other
        for path, dimension in space.items():
            for value in dimension.grid():
                near = _replaced(space, recipe, point, path, value)
                try:
                    size = gate.needed_bytes(recipe_at(recipe, near, "point"))
                except RaymemError:
                    continue
                if needed is None or size < needed:
                    needed, point = size, near
    figure = bytes_text(needed) if needed is not None else f"at least {bytes_text(at_least)}"
    return BudgetExceeded(
        f"budget: {bytes_text(gate.budget_bytes)} is below the smallest point of the space that was found, which needs "
        f"{figure}: {point}; raise the budget to that, or widen the space"
    )


def _replaced(space: Space, recipe: Recipe, point: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a point with another value in one dimension; dimensions that exist only then are at their smallest."""
    changed = {**point, path: value}
    return sample(space, recipe.to_dict(), lambda name, dimension: changed.get(name, dimension.grid()[0]))

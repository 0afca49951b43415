"""Trains a recipe to its artefact: the driver's part, with Ray workers or in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from raymem.errors import BudgetExceeded, RaymemError
from raymem.memory.budget import Exceeds, bytes_text, parse_bytes
from raymem.methods.probe import first_line
from raymem.planner import Plan, known_plan, plan_recipe, prediction_error
from raymem.recipe.schema import Recipe
from raymem.runs.artifacts import local_copy
from raymem.runs.data import row_facts
from raymem.runs.inference.scoring import Scoring
from raymem.runs.lock import only_one, set_aside
from raymem.runs.prepare import Split, index_of, prepare
from raymem.runs.record import datasets_of, note_data, note_plan
from raymem.runs.resolve import note_start, planned_recipes, resolve
from raymem.runs.resolved import ResolvedRun
from raymem.runs.results import TrainResult
from raymem.runs.suggest import Suggestion, suggest
from raymem.tracking import RunStart, Tracker, start_tracking
from raymem.training.artifacts.export import artifact_name
from raymem.training.artifacts.hub import check_export, push
from raymem.training.checkpoint import latest_manifest
from raymem.training.data.packed.shards import Prepared
from raymem.training.data.sources.early import check_files_are_here
from raymem.training.history import read_history
from raymem.training.job import PreparedRun
from raymem.training.loop import Outcome, total_steps
from raymem.training.reporter import Audience, Listener, Row, Status
from raymem.training.resume_rules import check_identity, identity_of

log = logging.getLogger(__name__)

Begin = Callable[[int], None]
"""A function that is told how many steps a training has."""
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class InSweep:
    """The facts of a sweep that a trial's run needs."""

    parent_run_id: str | None
    """Id of the sweep's run in the tracking system."""
    predicted_peak_bytes: int
    """Predicted peak of a step; the sweep has compared it with the budget."""
    point: Mapping[str, Any]
    """What the sweep has chosen for the trial: path in the recipe -> value."""
    answers: bool = False
    """Whether the sweep looks for a metric of the model's own answers."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training besides its recipe."""

    fresh: bool = False
    """Set an existing run of this name aside and start over."""
    force: bool = False
    """Train even if the predicted peak is above the recipe's budget."""
    listeners: Sequence[Listener] = ()
    """Functions that get the metric row of each step that is taken, in this process."""
    recorders: Sequence[Listener] = ()
    """Functions that get every row, after a resume also those that an earlier session may have delivered."""
    status: Status = log.info
    """A function that is told about progress before the first step and after the last one."""
    begin: Begin = lambda total_steps: None
    """A function that is told the number of the run's steps before the first one is taken."""
    source: Path | None = None
    """The recipe's file, for the tracked run."""
    group: str | None = None
    """The name of the pipeline that the run is a stage of, for the tracked run."""
    sweep: InSweep | None = None
    """The sweep of a run that is a trial; the artefact of a trial is not copied to the tracking system."""


def launch(
    recipe: Recipe,
    *,
    fresh: bool = False,
    force: bool = False,
    listeners: Sequence[Listener] = (),
    status: Status = log.info,
    begin: Begin = lambda total_steps: None,
    source: Path | None = None,
) -> TrainResult:
    """Train a recipe from its data to its artefact; a run of the same name on the same storage is resumed.

    Args:
        fresh, force, listeners, status, begin, source: see :class:`TrainOptions`.

    Raises:
        RaymemError: anything that is the user's to mend; the last good checkpoint stays.
    """
    check_files_are_here(recipe)
    storage = recipe.storage.open()
    if "/_ray_pkg_" in storage.path:  # Ray unpacks a job's working directory under such a name
        status(f"warning: {storage.path} is the job's temporary copy and goes with the cluster; set storage.path")
    with only_one(storage, recipe.name):
        run = resolve(recipe, fresh=fresh, build_demo=partial(build_demo, status=status), status=status)
        options = TrainOptions(fresh, force, listeners, status=status, begin=begin, source=source)
        return _train(run, None, options)


def train(run: ResolvedRun, options: TrainOptions, *, train_data: Prepared | None = None) -> TrainResult:
    """Train a run that was resolved before; see :func:`launch`.

    Args:
        train_data: where the caller has prepared it.
    """
    with only_one(run.storage, run.recipe.name):
        run.backend.connect(run.storage, options.status)
        return _train(run, train_data, options)


def _train(run: ResolvedRun, train_data: Prepared | None, options: TrainOptions) -> TrainResult:
    """Do everything behind the lock: prepare, predict, train, record."""
    if options.sweep is None:
        check_export(run.recipe)
    prepared = prepare(run, train_data=train_data, status=options.status)
    checkpoint = None if options.fresh else latest_manifest(run.run)
    if checkpoint is not None:
        identity = identity_of(prepared.recipe, prepared.train_data)
        check_identity(checkpoint.identity, identity, run.run.path, prepared.train_data)
        options.status(f"resuming from step {checkpoint.step}")
    earlier = [] if checkpoint is None else read_history(run.run, checkpoint.step)
    plan = _predict(run, prepared, force=options.force, status=options.status)
    predicted = None if plan is None else plan.step_peak_bytes
    if options.sweep is not None:
        predicted = options.sweep.predicted_peak_bytes
    prepared = replace(prepared, predicted_peak_bytes=predicted)
    if options.fresh:  # only now: a recipe that was refused above leaves the earlier run where it is
        set_aside(run.storage, run.recipe.name)
    note_start(run)
    note_data(run, prepared)
    if plan is not None:
        note_plan(run, plan)
    tracker = start_tracking(
        RunStart(
            run.recipe.to_dict(),
            run.storage.path,
            resume=checkpoint is not None,
            device="cuda" if run.recipe.scaling.use_gpu else "cpu",
            parent_run_id=None if options.sweep is None else options.sweep.parent_run_id,
            group=options.group,
            point={} if options.sweep is None else options.sweep.point,
            source=options.source,
            datasets=datasets_of(run, prepared),
        )
    )
    return _train_tracked(run, prepared, predicted, tracker, options, earlier)


def _train_tracked(
    run: ResolvedRun, prepared: PreparedRun, predicted: int | None, tracker: Tracker, options: TrainOptions,
    earlier: Sequence[Row],
) -> TrainResult:  # fmt: skip
    """Train, and end the tracked run in every case.

    Args:
        earlier: rows of the sessions before, of which a driver that was killed may have logged less.
    """
    rows: list[Row] = []
    scoring = _scoring(run, prepared, tracker, options)
    try:
        _log(tracker, earlier)
        if scoring is not None:
            _log(tracker, scoring.resume(int(earlier[-1]["step"]) if earlier else 0))
        began = time.perf_counter()
        options.begin(total_steps(prepared.recipe, prepared.train_data))
        recorders: list[Listener] = [rows.extend, tracker.log, *options.recorders]
        if scoring is not None:
            recorders.append(scoring.listen)
        audience = Audience(recorders, options.listeners, options.status)
        outcome = run.backend.train(prepared, audience)
        train_s = time.perf_counter() - began
        _log(tracker, rows)  # mends what an outage swallowed; what is there already is left out
        if predicted is not None and outcome.peak_bytes is not None:
            tracker.log([{"step": outcome.steps, "predicted_peak_bytes": predicted}])
            if options.sweep is None:
                prediction_error.record(run.recipe, predicted, outcome.peak_bytes)
        scores = {} if scoring is None else _final_scores(scoring, outcome, options)
        if options.sweep is not None:
            tracking = tracker.finish("FINISHED")
        else:
            name = artifact_name(run.recipe)
            tracking = tracker.finish("FINISHED", {name: local_copy(outcome.artifact)}, model=name)
    except BaseException as error:
        if scoring is not None:
            scoring.stop()
        _log(tracker, rows)
        tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    if options.sweep is not None:
        return TrainResult(outcome, tracking, run.recipe, predicted, train_s, scores=scores)
    pushed = _push(run.recipe, outcome.artifact, options.status)
    return TrainResult(outcome, tracking, run.recipe, predicted, train_s, _suggestion(run, prepared), scores, pushed)


def _scoring(run: ResolvedRun, prepared: PreparedRun, tracker: Tracker, options: TrainOptions) -> Scoring | None:
    """Return what judges the answers of a run's model, if anybody wants that."""
    sweep = options.sweep
    if run.recipe.train.score_every is None and (sweep is None or not sweep.answers):
        return None
    assert prepared.eval_data is not None, "a metric is of a source of data.eval"
    return Scoring(run, prepared.eval_data, tracker.log, options.status)


def _final_scores(scoring: Scoring, outcome: Outcome, options: TrainOptions) -> Row:
    """Return the metrics of the result's answers. Only a trial, which is nothing without them, fails for want of them.

    Raises:
        Exception: those of a trial's result cannot be had.
    """
    try:
        return scoring.finish(outcome.artifact, outcome.steps)
    except Exception as error:  # code of models may raise anything, and the result is there
        if options.sweep is not None:
            raise
        problem = first_line(error)
        log.warning("the answers of the result could not be judged: %s; raymem evaluate tries it again", problem)
        return {}


def _push(recipe: Recipe, artifact: str, status: Status) -> str | None:
    """Push the result of a run that is finished and recorded; return the address of the commit.

    Raises:
        RaymemError: the hub does not take it.
    """
    repo = recipe.export.push_to_hub
    if repo is None:
        return None
    status(f"pushing the result to {repo}")
    try:
        return push(Path(local_copy(artifact)), repo, private=recipe.export.private)
    except RaymemError as error:
        raise type(error)(
            f"export.push_to_hub: {error} (the run is finished, its result is {artifact}: `raymem push {artifact} "
            f"{repo}` or the same command does what is left)"
        ) from None


def _suggestion(run: ResolvedRun, prepared: PreparedRun) -> Suggestion | None:
    """Return a prompt of the evaluation data, or else of the training data."""
    split: Split = "train" if prepared.eval_data is None else "eval"
    data = prepared.eval_data or prepared.train_data
    section = run.recipe.data
    return suggest(section, split, data, run.tokenizer, run.storage, index_of(section, run.storage, run.backend))


def _log(tracker: Tracker, rows: Sequence[Row]) -> None:
    """Log many rows, in parts that a tracker can hold when its server is away."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        tracker.log(rows[start : start + _ROWS_AT_ONCE])


def _predict(run: ResolvedRun, prepared: PreparedRun, *, force: bool, status: Status) -> Plan | None:
    """Plan a run that has a budget; without one, such as a trial's, return its plan if it was planned before.

    A plan without data is of the largest rows that there can be; here the data is known.

    Raises:
        BudgetExceeded: the predicted peak is above the budget.
        RaymemError: the recipe has a budget, but cannot be planned.
    """
    recipe, asked = planned_recipes(run)
    rows = row_facts(prepared.recipe, prepared.train_data)
    if recipe.budget is None:
        alike = ((one, facts) for facts in (rows, None) for one in (recipe, asked))
        return next((plan for one, facts in alike if (plan := known_plan(one, facts)) is not None), None)
    status("predicting the memory")
    try:
        plan = plan_recipe(recipe, rows)
    except RaymemError as error:
        if not force:
            raise
        log.warning("the memory could not be predicted: %s", error)
        return None
    verdict = plan.verdict(parse_bytes(recipe.budget), recipe)
    if isinstance(verdict, Exceeds) and not force:
        change = " or ".join(verdict.would_help[:3]) or "a smaller model"
        raise BudgetExceeded(
            f"budget: {recipe.budget} is less than the {bytes_text(plan.capacity_bytes)} that a worker is predicted to "
            f"need, by {bytes_text(verdict.by_bytes)}; the largest term is {verdict.largest_term}: try {change} "
            "(`raymem plan --advise` works it out), or train anyway with --force"
        )
    return plan


def build_demo(recipe: Recipe, status: Status) -> None:
    """Pre-train a demo model, which takes about two minutes."""
    status("pre-training the demo model (once, about two minutes)")

    def progress(rows: Sequence[Row]) -> None:
        step, total = int(rows[-1]["step"]), recipe.train.steps or 0
        if step % max(1, total // 10) == 0:
            status(f"pre-training the demo model: step {step}/{total}, loss {rows[-1]['loss']:.2f}")

    launch(recipe, listeners=[progress], status=lambda text: None)

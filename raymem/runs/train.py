"""From a recipe to a trained artefact: what the driver does, with Ray workers or in this process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymem.errors import BudgetExceeded, RaymemError, StorageError
from raymem.memory.budget import Exceeds, bytes_text, parse_bytes
from raymem.planner import Plan, known_plan, plan_recipe, prediction_error, settle_micro_batch
from raymem.recipe.schema import Recipe
from raymem.runs import demo, loram_base
from raymem.runs.artifacts import local_copy
from raymem.runs.prepare import prepare_split, shared_tokenizer
from raymem.storage.storage import Storage
from raymem.tracking.sink import TrackingSink, TrackingSummary
from raymem.tracking.start import start_tracking
from raymem.training.artifacts.export import artifact_name
from raymem.training.checkpoint import latest_manifest
from raymem.training.data.tokenizer import load_tokenizer
from raymem.training.dist_env import Layout
from raymem.training.job import Job, Ready
from raymem.training.loop import Outcome, run
from raymem.training.model.build import build_model, check_fit
from raymem.training.model.revision import at_revision, began_with, record, resolve
from raymem.training.model.summary import what_is_trained
from raymem.training.reporter import Listener, LocalReporter, Row
from raymem.training.resume_rules import check_identity, identity_of

log = logging.getLogger(__name__)

Status = Callable[[str], None]
"""Told in a few words what is going on before the first step."""


@dataclass(frozen=True)
class Finished:
    """A run that came to its end."""

    outcome: Outcome
    tracking: TrackingSummary
    recipe: Recipe
    """As it was trained: demo names replaced by directories."""
    predicted_peak_bytes: int | None = None
    """Of a step, where the recipe was planned; beside ``outcome.peak_bytes``."""
    train_s: float = 0.0
    """From building the model to the artefact."""


@dataclass(frozen=True)
class InSweep:
    """What a trial of a sweep has from it."""

    parent_run_id: str | None
    """MLflow run of the sweep."""
    predicted_peak_bytes: int
    """Of a step; the sweep has held it against the budget."""


def launch(
    recipe: Recipe,
    *,
    fresh: bool = False,
    force: bool = False,
    listeners: Sequence[Listener] = (),
    status: Status = log.info,
    sweep: InSweep | None = None,
    ready: Ready | None = None,
) -> Finished:
    """Train a recipe from its data to its artefact; a run of the same name on the same storage is resumed.

    Args:
        fresh: set an existing run of this name aside and start over.
        force: train even if the predicted peak is above the recipe's budget.
        listeners: get every metric row, in this process.
        status: progress in words before the first step.
        sweep: given where the run is a trial; its artefact is then not copied to MLflow.
        ready: given where the base is checked and the data are prepared.

    Raises:
        RaymemError: anything that is the user's to mend; the last good checkpoint stays.
    """
    storage = Storage.open(recipe.storage.path)
    storage.check_writable()
    if "/_ray_pkg_" in storage.path:  # Ray unpacks a job's working directory under such a name
        status(f"warning: {storage.path} is the job's temporary copy and goes with the cluster; set storage.path")
    with only_one(storage, recipe.name):
        asked = recipe.model.revision if ready is None else ready.asked
        recipe = resolve(recipe, None if fresh else began_with(storage.child(recipe.name)))
        on_ray = recipe.scaling.num_workers != 0
        if on_ray:
            from raymem.cluster import connection
            from raymem.cluster.doctor import checks

            status("starting Ray")
            connection.connect(recipe)
            checks.check_storage_shared(storage.path)
        recipe = settle_micro_batch(recipe, status=status)
        job = _settle(recipe, storage, ready, on_ray=on_ray, fresh=fresh, status=status)
        if sweep is not None:
            predicted: int | None = sweep.predicted_peak_bytes
        else:
            plan = _predict(recipe, asked, force=force, status=status)
            predicted = None if plan is None else plan.step_peak_bytes
        if fresh:  # only now: a recipe that was refused above leaves the earlier run where it is
            set_aside(storage, recipe.name)
        record(job.run, job.recipe, asked)
        manifest = latest_manifest(job.run)
        sink = start_tracking(
            job.recipe.to_dict(),
            storage_path=storage.path,
            resume=manifest is not None,
            device="cuda" if recipe.scaling.use_gpu else "cpu",
            parent_run_id=None if sweep is None else sweep.parent_run_id,
        )
        rows: list[Row] = []
        try:
            began = time.perf_counter()
            outcome = _train(job, sink, [rows.extend, *listeners, _history_file(job.run)])
            train_s = time.perf_counter() - began
            sink.log_history(rows)  # mends what an outage swallowed; what is there already is left out
            if predicted is not None and outcome.peak_bytes is not None:
                sink.log_history([{"step": outcome.steps, "predicted_peak_bytes": predicted}])
            if sweep is not None:
                return Finished(outcome, sink.finish("FINISHED", {}), job.recipe, predicted, train_s)
            if predicted is not None and outcome.peak_bytes is not None:
                prediction_error.record(recipe, predicted, outcome.peak_bytes)
            with local_copy(outcome.artifact) as artifact:
                summary = sink.finish("FINISHED", {artifact_name(recipe): artifact}, **_registration(recipe))
        except BaseException as error:
            sink.log_history(rows)
            sink.finish("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        return Finished(outcome, summary, job.recipe, predicted, train_s)


def _predict(recipe: Recipe, asked: str | None, *, force: bool, status: Status) -> Plan | None:
    """What a run with a budget will need; without one, what was predicted before, if anything was.

    Args:
        asked: the revision that the recipe names; ``raymem plan`` resolves none.

    Raises:
        BudgetExceeded: more than the budget.
        RaymemError: the recipe has a budget, but cannot be planned.
    """
    if recipe.budget is None:
        return known_plan(recipe) or known_plan(at_revision(recipe, asked))
    status("predicting the memory")
    try:
        plan = plan_recipe(recipe)
    except RaymemError as error:
        if not force:
            raise
        log.warning("the memory could not be predicted: %s", error)
        return None
    judged = plan.verdict(parse_bytes(recipe.budget))
    if isinstance(judged, Exceeds) and not force:
        raise BudgetExceeded(
            f"budget: {recipe.budget} is less than the {bytes_text(plan.capacity_bytes)} that a worker is predicted to "
            f"need, by {bytes_text(judged.by_bytes)}; the largest term is {judged.largest_term}: try "
            f"{' or '.join(judged.would_help[:3])} (`raymem plan --advise` works it out), or train anyway with --force"
        )
    return plan


def _settle(recipe: Recipe, storage: Storage, ready: Ready | None, *, on_ray: bool, fresh: bool, status: Status) -> Job:
    """Check the model and prepare the data, so that mistakes show before workers start."""
    recipe = demo.resolve(recipe, storage, build=lambda r: build_demo(r, status))
    status("checking the model")
    recipe = loram_base.settled(recipe, storage, on_ray=on_ray) if ready is None else recipe
    model = build_model(recipe, meta=True)
    tokenizer = shared_tokenizer(recipe, storage) if ready is None else ready.tokenizer
    check_fit(model, load_tokenizer(tokenizer), recipe)
    for line in what_is_trained(model, recipe):
        status(str(line))
    del model
    status("preparing the data")
    if ready is None:
        train_data = prepare_split(recipe, "train", tokenizer, storage, on_ray=on_ray)
    else:
        train_data = ready.train_data
    has_eval = recipe.data.eval is not None
    eval_data = prepare_split(recipe, "eval", tokenizer, storage, on_ray=on_ray) if has_eval else None
    job = Job(recipe, storage, storage.child(recipe.name), train_data, eval_data)
    if not fresh and (manifest := latest_manifest(job.run)) is not None:
        check_identity(manifest.identity, identity_of(recipe, train_data), job.run.path)
        status(f"resuming from step {manifest.step}")
    return job


def build_demo(recipe: Recipe, status: Status) -> None:
    status("pre-training the demo model (once, about two minutes)")

    def progress(rows: Sequence[Row]) -> None:
        step, total = int(rows[-1]["step"]), recipe.train.steps or 0
        if step % max(1, total // 10) == 0:
            status(f"pre-training the demo model: step {step}/{total}, loss {rows[-1]['loss']:.2f}")

    launch(recipe, listeners=[progress], status=lambda text: None)


def _train(job: Job, sink: TrackingSink, listeners: Sequence[Listener]) -> Outcome:
    if job.recipe.scaling.num_workers == 0:
        reporter = LocalReporter(*listeners, sink.log_history)
        return run(job.recipe, Layout.current(job.recipe), job.run, job.train_data, job.eval_data, reporter)
    from raymem.cluster.train.controller import train_on_ray

    return train_on_ray(job, sink.spec(), listeners)


def _registration(recipe: Recipe) -> dict[str, Any]:
    tracking = recipe.tracking
    return {} if tracking.kind == "none" else {"register_as": tracking.register_as, "alias": tracking.alias}


def _history_file(run_storage: Storage) -> Listener:
    """Append rows to ``metrics.jsonl`` in a local run directory; of a replayed step the last row counts."""
    path = Path(run_storage.root) / "metrics.jsonl"

    def write(rows: Sequence[Row]) -> None:
        try:
            with path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:  # a log is no reason to lose a run; a full disk stops it at the next checkpoint
            log.warning("%s: cannot be written: %s", path, error.strerror)

    if not run_storage.is_local:
        return lambda rows: None
    path.parent.mkdir(parents=True, exist_ok=True)
    return write


def set_aside(storage: Storage, name: str) -> None:
    """Rename an existing run to ``<name>.old-<n>``; nothing is deleted for the user.

    Raises:
        StorageError: an object store cannot rename.
    """
    if not storage.exists(name):
        return
    if not storage.is_local:
        raise StorageError(
            f"{storage.join(name)}: --fresh cannot rename a run on an object store; delete it there, or choose "
            "another name"
        )
    number = 1
    while storage.exists(f"{name}.old-{number}"):
        number += 1
    os.rename(storage.join(name), storage.join(f"{name}.old-{number}"))
    log.info("the earlier run is now %s", storage.join(f"{name}.old-{number}"))


@contextlib.contextmanager
def only_one(storage: Storage, name: str) -> Iterator[None]:
    """Hold the run's lock; the system gives it back when the process ends, however it ends.

    Raises:
        StorageError: another process on a node that shares the lock trains a run of this name.
    """
    if not storage.is_local:
        yield
        return
    folder = Path(storage.join(".locks"))
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"{storage.join(name)}: another process is training this run; wait for it, stop it, or choose "
                "another name"
            ) from None
        yield

"""Starts Ray Tune for a search as often as it takes, and handles the ends of its trials."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ray import tune as ray_tune
from ray.exceptions import OutOfMemoryError
from ray.tune.schedulers import ASHAScheduler

from raymem.cluster.connection import session_directory
from raymem.cluster.reservations import free_reservation
from raymem.errors import ClusterError
from raymem.planner import prediction_error
from raymem.recipe.schema import Recipe
from raymem.runs.demo import discard_checkpoints
from raymem.storage.identity import check
from raymem.storage.leases import held as leases
from raymem.storage.storage import Storage
from raymem.sweeps.options import Objective, better
from raymem.sweeps.resources import most_at_once, nested
from raymem.sweeps.search import BudgetedSearch
from raymem.sweeps.trial import ATTEMPT, RESULT, TrialJob, run_trial

log = logging.getLogger(__name__)

Changed = Callable[[Collection[int]], None]
CRASHES = 2
"""The number of times that a trial is tried again after its process died."""


def tune(
    new_search: Callable[[], BudgetedSearch], recipe: Recipe, storage: Storage, admitted_bytes: int,
    scheduler: ASHAScheduler | None, changed: Changed,
) -> BudgetedSearch:  # fmt: skip
    """Run a search to its end; returns the one that came there.

    Args:
        new_search: a search that goes on from the journal.
        admitted_bytes: what a worker of a trial may need at most.
        scheduler: stops trials early.
        changed: called whenever a trial began or ended, with the numbers of those that run.

    Raises:
        ClusterError: nodes are out of memory before a trial begins.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a failed trial has none
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1")  # the next trial is judged while others run, not more
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends us like a kill: what runs goes on later
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    kills_without_trial = 0
    while True:
        search = new_search()
        follow = Follow(search, storage, recipe.name, changed)
        try:
            _fit(search, follow, recipe, admitted_bytes, scheduler)
        except RuntimeError as error:
            # Ray Tune crashes when Ray's memory monitor kills one of its workers.
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
            # The killed worker may have been idle, between trials; if that happens again and again, the node is full.
            kills_without_trial = 0 if follow.note_killed(str(error)) else kills_without_trial + 1
            if kills_without_trial > CRASHES:
                raise ClusterError(
                    "memory: Ray's memory monitor kills processes of this sweep before they train: others have taken "
                    "the memory of their node; free some, then run the same command again: it goes on"
                ) from None
            log.warning("Ray's memory monitor killed a process; trials that ran go on from their checkpoints")
            continue
        search.close()
        return search


def early_stopping(recipe: Recipe, objective: Objective) -> ASHAScheduler | None:
    """Return the scheduler that stops trials that are clearly worse at an evaluation; None with several objectives, or
    one that is known at the end only.
    """
    if len(objective.metrics) > 1 or objective.has_scores:
        return None
    train, metric = recipe.train, objective.metrics[0]
    tenth = -(-train.steps // 10) if train.steps else 1
    # By step and not by report: a trial that is resumed reports again what it reported before. No step is the last one
    # here: trials end by themselves.
    return ASHAScheduler(
        time_attr="step", metric=metric, mode=better(metric), grace_period=train.eval_every or tenth, max_t=1 << 40,
        reduction_factor=3, stop_last_trials=False,
    )  # fmt: skip


def _fit(
    search: BudgetedSearch, follow: Follow, recipe: Recipe, admitted_bytes: int, scheduler: ASHAScheduler | None
) -> None:  # fmt: skip
    def process(config: dict[str, Any]) -> Any:
        return ray_tune.PlacementGroupFactory([TrialJob.of(config).resources])

    ray_tune.Tuner(
        ray_tune.with_resources(run_trial, process),
        tune_config=ray_tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=most_at_once(recipe, admitted_bytes),
            # A trial that only waits for its workers cannot be stopped but with its process.
            reuse_actors=not nested(recipe),
            trial_dirname_creator=lambda trial: f"trial-{TrialJob.of(trial.config).number:04d}-{trial.trial_id}",
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=tempfile.mkdtemp(prefix="sweep-", dir=session_directory()),  # nothing of it is read again
            verbose=0,
            failure_config=ray_tune.FailureConfig(max_failures=CRASHES),
            callbacks=[follow],
        ),
    ).fit()


class Follow(ray_tune.Callback):  # type: ignore[misc]
    """Takes note of trials that end, and gives back the memory that they held."""

    def __init__(self, search: BudgetedSearch, storage: Storage, name: str, changed: Changed) -> None:
        self._search, self._storage, self._changed = search, storage, changed
        self._folder = storage.child(name).root
        self._running: dict[str, TrialJob] = {}
        self._ended: list[Recipe] = []

    def note_killed(self, message: str) -> bool:
        """Write the end of trials whose processes Ray's memory monitor killed; return whether there is any."""
        killed = killed_workers(message)
        end = {"status": "infeasible", "measured_bytes": 0, "problem": "killed: its node was out of memory"}
        any_trial = False
        for job in self._running.values():
            run = self._storage.child(job.recipe["name"])
            if run.exists(ATTEMPT) and run.read_record(ATTEMPT).get("ray_worker") in killed:
                any_trial = True
                if not run.exists(RESULT):
                    run.write_record(RESULT, {**end, "number": job.number})
        return any_trial

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._storage.is_local:
            check(Path(self._storage.root))
        leases.check(self._folder, ask=False)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running[trial.trial_id] = TrialJob.of(trial.config)
        self._tell()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        job = self._gone(trial)
        result = trial.last_result or {}
        infeasible = result.get("status") == "infeasible"
        measured = result.get("measured_bytes" if infeasible else "peak_bytes")
        recipe = Recipe.model_validate(job.recipe)
        on_cpu_it_counts_more = infeasible and not recipe.scaling.use_gpu
        if measured and not on_cpu_it_counts_more:
            prediction_error.record(recipe, job.predicted_bytes, int(measured))
        discard_checkpoints(recipe)
        self._ended.append(recipe)
        self._tell()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._gone(trial)
        self._search.problems[trial.trial_id] = _problem(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        log.warning("trial %d failed: %s", self._gone(trial).number, _problem(trial))
        self._tell()

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        for recipe in self._ended:  # workers of one that was stopped may have saved once more before they were gone
            discard_checkpoints(recipe)

    def _tell(self) -> None:
        self._changed({job.number for job in self._running.values()})

    def _gone(self, trial: Any) -> TrialJob:
        job = TrialJob.of(trial.config)
        self._running.pop(trial.trial_id, None)
        free_reservation(job.reservation)  # a process that was killed could not
        return job

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as nothing: Ray Tune pickles its callbacks for a restore that never comes."""
        return {}


def killed_workers(message: str) -> set[str]:
    """Return ids of workers that Ray's memory monitor says it killed; its report also lists those that it let live."""
    lines = [line for line in message.splitlines() if line.startswith("Selected to kill")]
    return set(re.findall(r"worker ID=(\w+)", "\n".join(lines)))


def _problem(trial: Any) -> str:
    """Return the last words of a trial's error on one line."""
    error = trial.get_pickled_error() or trial.get_error()
    return " ".join(str(getattr(error, "cause", None) or error).split())[-300:]

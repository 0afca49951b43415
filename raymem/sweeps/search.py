"""Samples the points of a sweep: Optuna proposes, the gate admits, Ray Tune runs.

Every proposal, refusal and result is an Optuna trial in one journal, which is all that a sweep knows: a killed one
goes on from it. (Ray Tune's own snapshots are pickles, and lag behind; they are not read.)
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from raymem.errors import RecipeError
from raymem.planner.admission import AdmissionController, Reject
from raymem.recipe.schema import Recipe
from raymem.recipe.space import ChoiceDimension, FloatDimension, IntDimension, Point, Space, grid, sample
from raymem.recipe.space_load import recipe_at
from raymem.seeds import derive
from raymem.sweeps.options import METRICS, Objective, better

log = logging.getLogger(__name__)

PATIENCE = 200
"""Proposals in a row that are refused before a search gives up."""
TRIES_PER_CALL = 2
"""Proposals that are judged at a time while trials run; in between Ray Tune listens to those."""

Configure = Callable[[int, Recipe, int, int], dict[str, Any]]
"""Maps ``(number, recipe, predicted step peak, needed bytes)`` to the config of a trial's process."""


class BudgetedSearch(Searcher):  # type: ignore[misc]
    """Proposes only what fits.

    A refused proposal never becomes a trial: the sampler is told how far it is from feasible, and asked again. What was
    under way when an earlier driver died comes first. A point that is being trained, or that came to an end of its own,
    is not trained again; one whose process died may be.

    Args:
        samples: trials to start, those of earlier drivers included.
        configure: makes the config of a trial.
    """

    def __init__(
        self, study: optuna.Study, space: Space, recipe: Recipe, gate: AdmissionController, objective: Objective, *,
        algorithm: str, samples: int, configure: Configure,
    ) -> None:  # fmt: skip
        super().__init__(metric=list(objective.metrics), mode=[better(name) for name in objective.metrics])
        self.study, self.objective = study, objective
        self.gave_up: str | None = None
        """The reason why the search ended before all samples."""
        self.problems: dict[str, str] = {}
        """Maps the id of a trial to the reason why its process died, where that is known."""
        self._space, self._recipe, self._gate = space, recipe, gate
        self._raw = recipe.to_dict()
        self._algorithm, self._samples, self._configure = algorithm, samples, configure
        self._running: dict[str, optuna.Trial] = {}
        # An earlier driver asked for it and died before it was judged: it has no config, and is of no use.
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if not started(trial):
                study.tell(trial.number, state=TrialState.FAIL)
        trials = study.get_trials(deepcopy=False)
        self._interrupted = [
            optuna.Trial(study, trial._trial_id) for trial in trials if trial.state == TrialState.RUNNING
        ]
        self._started = sum(started(trial) for trial in trials) - len(self._interrupted)
        self._in_a_row = 0
        if algorithm == "grid":
            known = {_text(_point(trial)) for trial in trials if trial.state != TrialState.FAIL or started(trial)}
            for point in grid(space, self._raw):
                if _text(point) not in known:
                    study.enqueue_trial(point)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Change nothing: the space is known already."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return a config, None to be asked again, or FINISHED."""
        if self._interrupted:  # even past the samples, which may have been lowered, or these would run for ever
            return self._start(trial_id, self._interrupted.pop(0))
        if self._started >= self._samples or self.gave_up:
            return str(Searcher.FINISHED)
        # Where nothing runs nobody has to be listened to, and Ray Tune would sleep a second after every call.
        for _ in range(TRIES_PER_CALL if self._running else PATIENCE):
            if self._algorithm == "grid" and not self._study_waits():
                self.gave_up = "every point of the grid was tried"
                return str(Searcher.FINISHED)
            trial = self._ask()
            if self._admit(trial):
                self._in_a_row = 0
                return self._start(trial_id, trial)
            self._in_a_row += 1
            if self._in_a_row >= PATIENCE:
                self.gave_up = f"{PATIENCE} proposals in a row were refused, or had been trained before"
                return str(Searcher.FINISHED)
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record a step on the way, which tells the sampler about trials that are stopped early."""
        trial, value = self._running.get(trial_id), result.get(self.objective.metrics[0])
        if trial is None or value is None or len(self.objective.metrics) > 1:
            return
        with warnings.catch_warnings(action="ignore"):  # a step that was reported before it was interrupted
            trial.report(value, int(result["step"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial, however it ended."""
        trial = self._running.pop(trial_id, None)
        if trial is None:
            return
        result = result or {}
        for name in (*METRICS, *self.objective.metrics, "overhead_s", "elapsed_s", "step"):
            if result.get(name) is not None:
                trial.set_user_attr(name, result[name])
        status = "crashed" if error else result.get("status", "stopped")
        trial.set_user_attr("status", status)
        if status == "infeasible":
            measured = result.get("measured_bytes") or 0
            trial.set_user_attr("measured_bytes", measured)
            trial.set_constraint("budget", max(1e-3, measured / self._gate.budget_bytes - 1))
        if problem := result.get("problem") or (self.problems.get(trial_id) if error else None):
            trial.set_user_attr("problem", problem)
        values = [float(result[name]) for name in self.objective.metrics if result.get(name) is not None]
        if status == "finished" and len(values) == len(self.objective.metrics):
            self.study.tell(trial, values)
        elif status == "crashed":  # which says nothing about the point
            self.study.tell(trial, state=TrialState.FAIL)
        else:  # TPE learns from these too; what diverged at once counts as the worst
            self.study.tell(trial, state=TrialState.PRUNED)

    def close(self) -> None:
        """End the trials that still run in the study; those that Ray Tune never reported back count as crashed."""
        for trial_id in list(self._running):
            self.on_trial_complete(trial_id, error=True)

    def _ask(self) -> optuna.Trial:
        # A sampler of its own for every proposal, so that a sweep that was interrupted draws as if it had not been.
        self.study.sampler = sampler(
            self._algorithm, derive(self._recipe.seed, "sweep", len(self.study.get_trials(deepcopy=False)))
        )
        return self.study.ask()

    def _admit(self, trial: optuna.Trial) -> bool:
        """Say whether a proposal may start; else the study is told why not."""
        point = sample(self._space, self._raw, partial(draw, trial))
        trial.set_user_attr("point", point)
        if (known := self._trained_before(point)) is not None:
            self._repeat(trial, known)
            return False
        try:
            recipe = recipe_at(self._recipe, point, f"point {trial.number}")
        except RecipeError as error:
            judged: Any = Reject(str(error), None, 1.0)
        else:
            began = time.perf_counter()
            judged = self._gate.judge(recipe)
            trial.set_user_attr("judged_s", round(time.perf_counter() - began, 3))
        if isinstance(judged, Reject):
            trial.set_user_attr("status", "refused")
            trial.set_user_attr("problem", judged.reason)
            trial.set_user_attr("predicted_bytes", judged.needed_bytes)
            trial.set_constraint("budget", judged.excess)
            self.study.tell(trial, state=TrialState.PRUNED)
            return False
        trial.set_user_attr("predicted_bytes", judged.step_peak_bytes)
        trial.set_user_attr("needed_bytes", judged.needed_bytes)
        return True

    def _repeat(self, trial: optuna.Trial, known: FrozenTrial) -> None:
        """Copy to a proposal what the study knows of the same point already."""
        trial.set_user_attr("same_as", known.number)
        for name, value in known.user_attrs.items():
            trial.set_user_attr(name, value)
        if known.state == TrialState.COMPLETE:
            self.study.tell(trial, known.values)
        elif known.state == TrialState.RUNNING:  # nothing is known yet; TPE keeps away from what runs by itself
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            for name, value in known.constraints.items():
                trial.set_constraint(name, value)
            for step, value in known.intermediate_values.items():
                trial.report(value, step)
            self.study.tell(trial, state=TrialState.PRUNED)

    def _start(self, trial_id: str, trial: optuna.Trial) -> dict[str, Any]:
        attributes = trial.user_attrs
        recipe = recipe_at(self._recipe, attributes["point"], f"point {trial.number}")
        self._running[trial_id] = trial
        self._started += 1
        return self._configure(trial.number, recipe, attributes["predicted_bytes"], attributes["needed_bytes"])

    def _trained_before(self, point: Point) -> FrozenTrial | None:
        """Return the trial of this point that runs or came to an end of its own."""
        states = [TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED]
        trials = self.study.get_trials(deepcopy=False, states=states)
        return next((trial for trial in trials if started(trial) and trial.user_attrs["point"] == point), None)

    def _study_waits(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=[TrialState.WAITING]))

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """See :meth:`save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as nothing: Ray Tune pickles its search for a restore that never comes, and files cannot be."""
        return {}

    def get_state(self) -> dict[str, Any]:
        """See :meth:`save`."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """See :meth:`save`."""


def sampler(algorithm: str, seed: int) -> optuna.samplers.BaseSampler:
    """Return Optuna's sampler for a name in :data:`raymem.sweeps.options.ALGORITHMS`."""
    seed %= 2**32
    with warnings.catch_warnings(action="ignore"):  # multivariate TPE is marked experimental
        if algorithm == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        if algorithm == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    return optuna.samplers.RandomSampler(seed=seed)


def started(trial: FrozenTrial) -> bool:
    """Say whether a proposal became a trial."""
    attributes = trial.user_attrs
    return "needed_bytes" in attributes and "same_as" not in attributes


def draw(trial: optuna.Trial, path: str, dimension: FloatDimension | IntDimension | ChoiceDimension) -> Any:
    """Return a value of a dimension, as the sampler of a trial proposes it."""
    if dimension.type == "choice":
        return trial.suggest_categorical(path, dimension.choices)
    if dimension.type == "int":
        return trial.suggest_int(path, dimension.low, dimension.high, log=dimension.log)
    return trial.suggest_float(path, dimension.low, dimension.high, log=dimension.log)


def _point(trial: FrozenTrial) -> Point:
    """Return the point of a proposal, or the one that it is to have once it is asked for."""
    point: Point = trial.user_attrs.get("point") or trial.system_attrs.get("fixed_params", {})
    return point


def _text(point: Point) -> str:
    return json.dumps(point, sort_keys=True)

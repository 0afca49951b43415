"""A trial's process: it trains one point of a sweep and reports to Ray Tune.

The process of a trial that trains in it is used again by later trials; after an out-of-memory error or a crash Ray Tune
replaces it. A trial's end is also written beside its run, so that it is known even if nobody was there to hear it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from raymem.cluster.reservations import reserved
from raymem.errors import AdapterError, DataError, ModelError, NonFiniteError, OutOfMemory, RecipeError, RunBusy
from raymem.memory.oom import measured_at_failure, oom_kills
from raymem.recipe.axes import register_again, registered
from raymem.recipe.load import parse_recipe
from raymem.recipe.schema import Recipe
from raymem.storage.identity import held
from raymem.storage.storage import Storage
from raymem.sweeps.resources import nested
from raymem.training.reporter import Listener, Row

if TYPE_CHECKING:
    from raymem.runs.resolved import ResolvedRun
    from raymem.runs.results import TrainResult

log = logging.getLogger(__name__)

RESULT = "trial.json"
"""The file in the directory of a trial's run with its last report, once it has ended."""
ATTEMPT = "attempt.json"
"""The file beside it that says which process began the trial, and what that process knew."""
FINAL = (NonFiniteError, RecipeError, ModelError, DataError, AdapterError)
"""Errors after which another try would end the same way: a learning rate that diverges, say. (A full disk or a server
that is down would not.)"""
PREDECESSOR_S = 300.0
"""Seconds for which a trial waits for a process that still trains it."""
REPORTED = ("eval_loss", "loss", "peak_bytes", "tokens_per_s", "elapsed_s", "step")


@dataclass(frozen=True)
class TrialJob:
    """Everything that a trial's process is told, in plain values."""

    number: int
    """Number of the proposal in the sweep's journal."""
    recipe: dict[str, Any]
    predicted_bytes: int
    """Predicted peak of a step."""
    memory_bytes: int
    """Host memory that is reserved with Ray while the trial runs; 0 if its workers do that."""
    threads: int
    """Threads of torch; 0 leaves them to the workers."""
    resources: dict[str, float]
    """The Ray resources of the trial's process."""
    parent_run_id: str | None
    """Id of the sweep's run in the tracking system."""
    storage_id: str | None
    """Id of the sweep's storage; None of an object store."""
    point: dict[str, Any] = field(default_factory=dict)
    """What the sweep has chosen: path in the recipe -> value."""
    answers: bool = False
    """Whether the sweep looks for a metric of the model's own answers."""

    def to_config(self) -> dict[str, Any]:
        """Pack the job for Ray Tune into few values, since Ray Tune builds long names from many."""
        return {"job": json.dumps(asdict(self)), "kinds": json.dumps(registered())}

    @property
    def reservation(self) -> str:
        """Name the host memory that the trial reserves."""
        return f"{self.recipe['name']}-memory"

    @staticmethod
    def of(config: dict[str, Any]) -> TrialJob:
        """Read the job from a config in another process, and registers the driver's kinds there."""
        register_again(json.loads(config["kinds"]))
        return TrialJob(**json.loads(config["job"]))


def run_trial(config: dict[str, Any]) -> None:
    """Run a trial; this is the function that Ray Tune calls."""
    # Give the thread of a stopped trial up to 120 s to end its tracked run before this process takes the next trial:
    # Ray Tune's default of 2 s may drop that one without a word.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")
    job = TrialJob.of(config)
    recipe = parse_recipe(job.recipe, f"trial {job.number}")
    storage = recipe.storage.open()
    with nullcontext() if job.storage_id is None else held(Path(storage.root), job.storage_id):
        _run_held(recipe, job, storage.child(recipe.name))


def _run_held(recipe: Recipe, job: TrialJob, run: Storage) -> None:
    """Run a trial on the storage of its sweep."""
    from ray import tune

    end, error = earlier_result(run), None
    if end is None:
        run.write_record(ATTEMPT, _circumstances())
        if job.threads:
            import torch

            torch.set_num_threads(job.threads)
        end, error = _end_of_training(recipe, job)
        run.write_record(RESULT, end)
    if error is not None:
        raise error  # ends this process, whose memory may be in pieces; the next one tells the result
    tune.report(end)


def _end_of_training(recipe: Recipe, job: TrialJob) -> tuple[dict[str, Any], OutOfMemory | None]:
    """Train; returns the trial's last report, and the error if memory ran out."""
    latest: dict[str, Any] = {"number": job.number}
    try:
        with reserved(job.reservation, job.memory_bytes):
            began = time.perf_counter()
            result = _train(recipe, job, _evaluations_to_tune(recipe, latest))
            overhead_s = time.perf_counter() - began - result.train_s
    except OutOfMemory as error:
        # This process knows no figure of a worker elsewhere.
        measured = 0 if nested(recipe) else measured_at_failure(error, on_gpu=recipe.scaling.use_gpu)
        return {**latest, "status": "infeasible", "measured_bytes": measured, "problem": str(error)}, error
    except FINAL as error:
        return {**latest, "status": "failed", "problem": str(error)}, None
    outcome = result.outcome
    figures = {"loss": outcome.loss, "eval_loss": outcome.eval_loss, "peak_bytes": outcome.peak_bytes}
    return {
        **latest,
        **{name: value for name, value in figures.items() if value is not None},
        **result.scores,
        "train_s": result.train_s + outcome.earlier_s,
        "overhead_s": overhead_s,
        "status": "finished",
    }, None


def _evaluations_to_tune(recipe: Recipe, latest: dict[str, Any]) -> Listener:
    """Keep the latest value of each metric in ``latest``, and reports it to Ray Tune at every evaluation but the last.

    The last one is told with the end: a trial that has come so far is not stopped.
    """
    from ray import tune

    def listen(rows: Sequence[Row]) -> None:
        for row in rows:
            latest.update({name: row[name] for name in REPORTED if name in row})
            if "eval_loss" in row and row["step"] != recipe.train.steps:
                tune.report(dict(latest))

    return listen


def earlier_result(run: Storage) -> dict[str, Any] | None:
    """Return the end of this trial in an earlier attempt, or None if it is to be trained (on).

    The kernel leaves no word about a process that it kills for memory, but a count. Anything in the container counts
    there, so only an attempt of the same driver is held against it.
    """
    if run.exists(RESULT):
        return run.read_record(RESULT, {"status": (str,)})
    if run.exists(ATTEMPT):
        before, now = run.read_record(ATTEMPT), _circumstances()
        same = all(before.get(name) == now[name] for name in ("host", "ray_job"))
        if same and now["oom_kills"] > before["oom_kills"]:
            end = {"status": "infeasible", "measured_bytes": 0, "problem": "killed: the container was out of memory"}
            run.write_record(RESULT, end)
            return end
    return None


def _train(recipe: Recipe, job: TrialJob, listen: Listener) -> TrainResult:
    """Train the recipe whole, on a model that is pruned first if that has to be."""
    from raymem.runs.loram.models import PlannedModel
    from raymem.runs.resolve import resolve
    from raymem.runs.train import InSweep, TrainOptions, train

    run = resolve(recipe)
    if isinstance(run.base, PlannedModel):
        run = _on_pruned_model(run)
    options = TrainOptions(
        recorders=[listen], sweep=InSweep(job.parent_run_id, job.predicted_bytes, job.point, job.answers)
    )
    return _after_its_predecessor(lambda: train(run, options))


def _after_its_predecessor(train: Callable[[], TrainResult]) -> TrainResult:
    """Train once the process is gone that trained this for an earlier driver: Ray may take a while to end it.

    Raises:
        RunBusy: it does not end.
    """
    deadline = time.monotonic() + PREDECESSOR_S
    while True:
        try:
            return train()
        except RunBusy as busy:
            if time.monotonic() > deadline:
                raise
            log.warning("%s; this trial waits for it", busy)
            time.sleep(1.0)


def _on_pruned_model(run: ResolvedRun) -> ResolvedRun:
    """Return the run on its pruned model. The first of the trials that share one makes it; the others wait for it."""
    from raymem.runs.lock import in_turn
    from raymem.runs.loram.models import PlannedModel
    from raymem.runs.loram.pipeline import Pipeline

    assert isinstance(run.base, PlannedModel)
    pipeline = Pipeline(run.asked, run=run)
    with in_turn(run.storage, f"pruning-{PurePosixPath(run.base.site.name).name}"):
        pipeline.prune()
        pipeline.align()
    return pipeline.trainable()


def _circumstances() -> dict[str, Any]:
    """Identify this process and its machine."""
    import ray

    here = ray.get_runtime_context()
    return {
        "host": os.uname().nodename,
        "ray_job": here.get_job_id(),
        "ray_worker": here.get_worker_id(),
        "oom_kills": oom_kills(),
    }

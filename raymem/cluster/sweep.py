"""The driver of a sweep: Ray Tune over the points that fit, one journal, one report."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymem.cluster import data, demo
from raymem.cluster.search import METRICS, BudgetedSearch, Objective, open_study
from raymem.cluster.sweep_report import SweepRow, best_of, rows_of, write_report
from raymem.cluster.sweep_resources import admitted_bytes, most_at_once, resources_of
from raymem.cluster.trainer import Status, build_demo, only_one, set_aside
from raymem.cluster.trial import RESULT, TrialJob, free_reservation, run_trial
from raymem.errors import BudgetExceeded, RaymemError, RecipeError, StorageError
from raymem.memory.budget import bytes_text
from raymem.planner import calibration
from raymem.planner.gate import Gate
from raymem.tracking.start import start_tracking
from raymem.training.model import pin_revision
from raymem.training.recipe import Recipe
from raymem.training.recipe_io import nearest
from raymem.training.space import Space, sample
from raymem.training.space_io import recipe_at
from raymem.training.storage import Storage

log = logging.getLogger(__name__)

CRASHES = 2
"""Times that a trial is tried again after its process died."""
Watch = Callable[[list[SweepRow]], None]
"""Told all rows whenever one has changed."""


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep looks for what."""

    budget_bytes: int
    """Of one worker's device."""
    samples: int = 50
    """Trials to start; refused proposals do not count."""
    objective: Objective = field(default_factory=lambda: Objective(("eval_loss",)))
    algorithm: str = "tpe"
    """One of :data:`raymem.cluster.search.ALGORITHMS`."""
    early_stopping: bool = True
    """Stop what is clearly worse at its evaluations (ASHA); with several objectives nothing is."""
    gpu: str | None = None
    """Kind of GPU, for the planner."""


@dataclass(frozen=True)
class Swept:
    """A sweep that came to its end."""

    folder: Path
    """Report, journal and best recipe."""
    rows: list[SweepRow]
    gave_up: str | None
    """Why it ended before all samples, if it did."""
    run_id: str | None
    """MLflow run whose children are the trials."""


def check_metrics(names: tuple[str, ...]) -> None:
    """Refuse a metric that no trial reports. Raises RecipeError."""
    for name in names:
        if name not in METRICS:
            raise RecipeError(f"objective {name!r}: no trial reports that{nearest(name, METRICS)}")


def sweep(
    recipe: Recipe, space: Space, options: SweepOptions, *,
    fresh: bool = False, status: Status = log.info, watch: Watch = lambda rows: None,
) -> Swept:  # fmt: skip
    """Search a space under a budget; a sweep of the same name on the same storage goes on.

    Args:
        recipe: what every trial starts from; its name is the sweep's.

    Raises:
        BudgetExceeded: nothing in the space fits; names the smallest figure.
        RaymemError: whatever makes every trial impossible.
    """
    check_metrics(options.objective.metrics)
    if recipe.data.eval is None and "eval_loss" in options.objective.metrics:
        raise RecipeError("objective 'eval_loss': the recipe has no data.eval; add it, or use --objective loss")
    storage = Storage.open(recipe.storage.path)
    if not storage.is_local:
        raise StorageError(
            f"storage.path: {recipe.storage.path} is an object store, and a sweep keeps a journal that is appended to; "
            "use a directory that every node sees"
        )
    storage.check_writable()
    from raymem.cluster import connection, preflight

    with only_one(storage, recipe.name):
        status("starting Ray")
        connection.connect(recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update={"num_workers": 0})}))
        preflight.check_storage_shared(storage.path)
        if fresh:
            set_aside(storage, recipe.name)
        folder = Path(storage.join(recipe.name))
        resumed, key = _same_sweep(folder, recipe, space, options)
        recipe = _settled(recipe, storage, status)
        study = open_study(folder / "journal.log", options.objective, recipe.name)
        sink = start_tracking(
            recipe.to_dict(),
            storage_path=storage.path,
            resume=resumed,
            device="cuda" if recipe.scaling.use_gpu else "cpu",
            tags={"raymem.sweep": recipe.name, "raymem.budget": bytes_text(options.budget_bytes)},
        )
        ended = "FAILED"
        try:
            with Gate(admitted_bytes(recipe, options.budget_bytes, status), gpu=options.gpu) as gate:
                configure = _configurer(f"{recipe.name[:53]}-{key}", sink.run_id)
                search = BudgetedSearch(
                    study, space, recipe, gate, options.objective,
                    algorithm=options.algorithm, samples=options.samples, configure=configure,
                )  # fmt: skip
                status("starting the planner")
                gate.judge(recipe)
                status(f"searching {len(space)} dimensions under {bytes_text(options.budget_bytes)}")
                try:
                    _tune(search, recipe, storage, options, lambda: watch(rows_of(study.get_trials(deepcopy=False))))
                    search.close()
                finally:
                    trials = study.get_trials(deepcopy=False)
                    rows = write_report(folder / "report", trials, recipe, options.objective, options.budget_bytes)
                if not any(row.status != "refused" for row in rows):
                    raise _nothing_fits(space, recipe, gate, rows)
            if (best := best_of(rows, options.objective)) is not None:
                sink.log_history([{"step": best.number, **{f"best_{name}": v for name, v in best.metrics.items()}}])
            ended = "FINISHED"
        except KeyboardInterrupt:
            ended = "KILLED"
            raise
        finally:
            report = folder / "report"
            sink.finish(ended, {"sweep": report} if report.is_dir() else {})  # type: ignore[arg-type]
        return Swept(folder, rows, search.gave_up, sink.run_id)


def _same_sweep(folder: Path, recipe: Recipe, space: Space, options: SweepOptions) -> tuple[bool, str]:
    """Whether this sweep was begun before, and the key in its trials' names; another one of the same name is refused.

    With the key a sweep that starts over does not find the trials of the one that it replaces.

    Raises:
        RecipeError: names what differs.
    """
    plain = recipe.to_dict()
    now = {
        **{section: plain[section] for section in ("seed", "model", "data", *_AXES, "train", "scaling")},
        "space": {path: dimension.model_dump(mode="json") for path, dimension in space.items()},
        "budget": options.budget_bytes,
        "objective": list(options.objective.metrics),
        "algorithm": options.algorithm,
    }
    file = folder / "sweep.json"
    if file.exists():
        before = json.loads(file.read_text())
        if different := [name for name in now if now[name] != before.get(name)]:
            raise RecipeError(
                f"{folder}: a sweep of this name with another {', '.join(different)} lies there; choose another "
                "--name, or start over with --fresh"
            )
        return True, before["key"]
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    key = secrets.token_hex(2)
    part.write_text(json.dumps({**now, "key": key}, indent=1) + "\n")
    part.replace(file)
    return False, key


_AXES = ("base", "adapter", "activations", "optimizer")


def _settled(recipe: Recipe, storage: Storage, status: Status) -> Recipe:
    """Build and prepare once what every trial would; returns the recipe with its revision pinned."""
    resolved = pin_revision(demo.resolve(recipe, storage, build=lambda wanted: build_demo(wanted, status)))
    status("preparing the data")
    tokenizer = data.shared_tokenizer(resolved, storage)
    data.prepare_split(resolved, "train", tokenizer, storage, on_ray=True)
    if recipe.data.eval is not None:
        data.prepare_split(resolved, "eval", tokenizer, storage, on_ray=True)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": resolved.model.revision})})


def _configurer(name: str, parent_run_id: str | None) -> Callable[[int, Recipe, int, int], dict[str, Any]]:
    """Makes a trial's config."""

    def configure(number: int, point: Recipe, predicted_bytes: int, needed_bytes: int) -> dict[str, Any]:
        scaling, resources, memory, threads = resources_of(point, needed_bytes)
        plain = point.to_dict() | {"name": f"{name}-{number:04d}", "scaling": scaling, "budget": None}
        job = TrialJob(number, plain, predicted_bytes, memory, threads, resources, parent_run_id)
        return job.to_config()

    return configure


def _tune(
    search: BudgetedSearch, recipe: Recipe, storage: Storage, options: SweepOptions, changed: Callable[[], None]
) -> None:
    """Run Ray Tune to the end of the search."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a failed trial has none
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1")  # the next trial is judged while others run, not more
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends us like a kill: what runs goes on later
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    early = options.early_stopping and len(options.objective.metrics) == 1
    metric = options.objective.metrics[0]
    scheduler: Any = FIFOScheduler()
    if early:
        # Every trial evaluates equally often, so reports can be compared by their number.
        scheduler = ASHAScheduler(metric=metric, mode=METRICS[metric], max_t=10_000, grace_period=1, reduction_factor=3)

    def process(config: dict[str, Any]) -> Any:
        return tune.PlacementGroupFactory([TrialJob.of(config).resources])

    tuner = tune.Tuner(
        tune.with_resources(run_trial, process),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=most_at_once(recipe),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial-{TrialJob.of(trial.config).number:04d}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage.join(recipe.name),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=CRASHES),
            callbacks=[_callback(search, storage, changed)],
        ),
    )
    tuner.fit()


def _callback(search: BudgetedSearch, storage: Storage, changed: Callable[[], None]) -> Any:
    from ray import tune
    from ray.exceptions import OutOfMemoryError

    class Follow(tune.Callback):  # type: ignore[misc]
        """Takes note of what ends, and gives back what dead processes held."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            changed()

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            job = TrialJob.of(trial.config)
            result = trial.last_result or {}
            measured = (
                result.get("measured_bytes") if result.get("status") == "infeasible" else result.get("peak_bytes")
            )
            recipe = Recipe.model_validate(job.recipe)
            on_cpu_it_counts_more = result.get("status") == "infeasible" and not recipe.scaling.use_gpu
            if measured and not on_cpu_it_counts_more:
                calibration.record(recipe, job.predicted_bytes, int(measured))
            changed()

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            job = TrialJob.of(trial.config)
            free_reservation(f"{job.recipe['name']}-memory")
            run = storage.child(job.recipe["name"])
            search.problems[trial.trial_id] = _text(_cause(trial))
            if isinstance(_cause(trial), OutOfMemoryError) and not run.exists(RESULT):  # Ray's memory monitor
                told = {"status": "infeasible", "measured_bytes": 0, "problem": "killed: its node was out of memory"}
                run.write_json(RESULT, told)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            job = TrialJob.of(trial.config)
            free_reservation(f"{job.recipe['name']}-memory")
            log.warning("trial %d failed: %s", job.number, _text(_cause(trial)))
            changed()

    return Follow()


def _cause(trial: Any) -> BaseException | None:
    error: BaseException | None = trial.get_error()
    cause: BaseException | None = getattr(error, "cause", None)
    return cause or error


def _text(error: BaseException | None) -> str:
    """The last words of an error on one line."""
    return " ".join(str(error).split())[-300:]


def _nothing_fits(space: Space, recipe: Recipe, gate: Gate, rows: list[SweepRow]) -> RaymemError:
    """The error of a sweep in which no trial was started, with the least that any point needs."""
    sized = [row for row in rows if row.predicted_bytes is not None]
    if not sized:
        problem = rows[-1].problem if rows else "the space has no point"
        return RecipeError(f"no point of the space can be trained; the last one: {problem}")
    point, needed = min(((row.point, row.predicted_bytes or 0) for row in sized), key=lambda found: found[1])
    needed = 1 << 62
    for _ in range(2):  # from the smallest proposal along one dimension after the other
        for path, dimension in space.items():
            for value in dimension.grid():
                try:
                    size = gate.needed_bytes(recipe_at(recipe, _replaced(space, recipe, point, path, value), "point"))
                except RaymemError:
                    continue
                if size < needed:
                    needed, point = size, _replaced(space, recipe, point, path, value)
    return BudgetExceeded(
        f"budget: {bytes_text(gate.budget_bytes)} is below the smallest point of the space that was found, which needs "
        f"{bytes_text(needed)}: {point}; raise the budget to that, or widen the space"
    )


def _replaced(space: Space, recipe: Recipe, point: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A point with another value in one dimension; what exists only then is at its smallest entry."""
    wanted = {**point, path: value}
    return sample(space, recipe.to_dict(), lambda name, dimension: wanted.get(name, dimension.grid()[0]))

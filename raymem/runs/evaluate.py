"""Evaluates a run's artefact on the recipe's evaluation data, in this process or as one Ray task."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from raymem.errors import DataError, ModelError, StorageError
from raymem.memory.oom import is_out_of_memory
from raymem.methods.probe import first_line
from raymem.methods.sentences import first_step
from raymem.metrics import Score, scores
from raymem.recipe.axes import BASES, full_base, no_adapter
from raymem.recipe.schema import Recipe
from raymem.runs.artifacts import local_copy
from raymem.runs.backend import backend_of
from raymem.runs.inference.sharing import more_workers, named_memory, sharing
from raymem.runs.prepare import prepare_split
from raymem.runs.record import note_predictions
from raymem.runs.resolve import resolve
from raymem.runs.resolved import ResolvedRun
from raymem.runs.results import EvaluationResult
from raymem.storage.checksums import check_files
from raymem.training.artifacts.export import artifact_name
from raymem.training.artifacts.facts import FACTS
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shards import Prepared
from raymem.training.data.packed.shared import localise, to_dict
from raymem.training.data.sources.early import check_files_are_here
from raymem.training.data.tokenizer import load_tokenizer
from raymem.training.dist_env import DistEnv
from raymem.training.evaluate import Evaluation, evaluate, evaluation_rows
from raymem.training.job import Doing
from raymem.training.model.adapter import continuing, is_peft
from raymem.training.model.build import build_model, tokenizer_path
from raymem.training.predictions import Prediction, answers, predict
from raymem.training.reporter import Status

log = logging.getLogger(__name__)


def evaluate_recipe(
    recipe: Recipe, artifact: str | None = None, *, predictions: int = 0, status: Status = log.info
) -> EvaluationResult:
    """Compute the evaluation loss of a run's artefact, on the revision of the base that it was trained on.

    A model that the recipe shares among workers (``scaling.strategy: fsdp2``), or that one device cannot hold, is
    spread over FSDP2 workers.

    Args:
        artifact: PEFT or model directory; ``base`` is the model without an adapter; by default the run's own result.
        predictions: so many evaluation examples are continued by the model; the run keeps those of its own result.
        status: told of a model that workers share, and what these do.

    Raises:
        DataError: the recipe has no evaluation data.
        BudgetExceeded: no number of workers can hold the model, see :func:`raymem.runs.inference.sharing.sharing`.
        OutOfMemory: they could not; says what helps.
        ModelError: there is nothing to evaluate, or the recipe names another revision than it was trained on.
    """
    check_has_eval(recipe)
    check_files_are_here(recipe, ("eval",))
    given, artifact = artifact, artifact or own_artifact(recipe)
    run = resolve(recipe, artifact=artifact)
    run.require_base()
    result = evaluate_run(run, artifact, prepare_split(run, "eval"), predictions=predictions, status=status)
    if given is None and result.predictions:
        try:
            note_predictions(run.run, artifact, [one.to_dict() for one in result.predictions])
        except StorageError as error:  # others may evaluate a run that they may only read
            log.warning("the predictions are not kept for raymem report: %s", error)
    return result


def evaluate_run(
    run: ResolvedRun, artifact: str, data: Prepared, *, predictions: int = 0, status: Status = log.info
) -> EvaluationResult:
    """Compute the evaluation loss of an artefact on prepared data; see :func:`evaluate_recipe`."""
    scaling, recipe, backend = sharing(run.recipe, status), run.recipe, run.backend
    if scaling != recipe.scaling:
        recipe, backend = recipe.model_copy(update={"scaling": scaling}), backend_of(scaling)
        backend.connect(run.storage, status)
    config = evaluation_config(recipe, artifact, data, predictions)
    return EvaluationResult(artifact, *backend.group(evaluation_task, config, status))


def evaluation_config(recipe: Recipe, artifact: str, data: Prepared, predictions: int = 0) -> dict[str, Any]:
    """Return what :func:`evaluation_task` takes, as plain data."""
    return {"recipe": recipe.to_dict(), "artifact": artifact, "data": to_dict(data), "predictions": predictions}


def check_has_eval(recipe: Recipe) -> None:
    """Refuse a recipe without evaluation data. Raises DataError."""
    if recipe.data.eval is None:
        raise DataError("data.eval: this recipe has no evaluation data; add it, or --set data.eval=<path>")


def evaluation_task(
    config: dict[str, Any], dist_env: DistEnv, doing: Doing
) -> tuple[Evaluation, list[Prediction]]:  # fmt: skip
    """Evaluate, in one process or as one of the ranks that share the model; takes plain data, returns plain values."""
    recipe = Recipe.model_validate(config["recipe"])
    more = "set scaling.strategy: fsdp2 and " + more_workers("scaling.num_workers:", dist_env)
    directory = local_copy(config["artifact"])
    with named_memory(dist_env, more):
        if directory != "base":
            check_files(directory, ModelError)
        adapter = Path(directory) if is_peft(directory) else None
        return _evaluate(_with_weights(recipe, directory), adapter, config, dist_env, doing)


def _evaluate(
    recipe: Recipe, adapter: Path | None, config: dict[str, Any], dist_env: DistEnv, doing: Doing
) -> tuple[Evaluation, list[Prediction]]:  # fmt: skip
    prepared = localise(config["data"], recipe.storage.open())
    doing("loading the weights", brief=False, told=True)
    model = build_model(recipe, dist_env, adapter_at=adapter)
    mixed = recipe.train.is_mixed
    rows = evaluation_rows(prepared)
    doing("evaluating", brief=False, told=True)
    with first_step(model, is_first=True):
        result = evaluate(
            model, rows, dist_env, micro_batch=recipe.train.rows_per_pass, mixed=mixed,
            progress=lambda: doing("a batch of the evaluation"),
        )  # fmt: skip
    if not config["predictions"] and not any(source.metric for source in recipe.data.eval or ()):
        return result, []
    tokenizer = load_tokenizer(tokenizer_path(Recipe.model_validate(config["recipe"])))
    result = replace(result, scores=tuple(_judged(recipe, model, tokenizer, prepared, doing)))
    if not config["predictions"]:
        return result, []
    doing("generating predictions", brief=False, told=True)
    try:
        micro_batch = recipe.train.rows_per_pass
        return result, predict(model, rows, tokenizer, config["predictions"], micro_batch=micro_batch, mixed=mixed)
    except Exception as error:  # code of models may raise anything, and the figures are worth having
        if is_out_of_memory(error):
            raise
        log.warning("no predictions: %s cannot generate (%s)", type(model).__name__, first_line(error))
        return result, []


def _judged(recipe: Recipe, model: Any, tokenizer: Any, prepared: Prepared, doing: Doing) -> list[Score]:
    """Judge the model's own answers to the sources that have metrics; all ranks that share the model do."""
    found: list[Score] = []
    for number, (source, rows) in enumerate(zip(recipe.data.eval or (), prepared.sources, strict=True)):
        if not source.metric:
            continue
        where = recipe.data.path_of("eval", number)
        if rows.row_format == "text":
            raise DataError(f"{where}.metric: plain texts have no answers that could be judged; leave metric out")
        if rows.truncated:
            log.warning(
                "%s: %d examples are cut by data.sequence_length: %d, and judged by what is left of their answers",
                where, rows.truncated, recipe.data.sequence_length,
            )  # fmt: skip
        doing(f"answering {where}", brief=False, told=True)
        pairs = answers(
            model, PackedRows([(rows.directory, 1.0)]), tokenizer,
            micro_batch=recipe.train.rows_per_pass, mixed=recipe.train.is_mixed,
            progress=lambda: doing("a batch of answers"),
        )  # fmt: skip
        found += scores(where, source.metric, pairs)
    return found


def own_artifact(recipe: Recipe) -> str:
    """Return where the result of a recipe's run lies.

    Raises:
        ModelError: there is none yet.
    """
    run = recipe.storage.open().child(recipe.name)
    name = artifact_name(recipe)
    if not run.exists(f"{name}/{FACTS}"):
        raise ModelError(
            f"{run.join(name)}: run {recipe.name!r} has no result yet; train it first, or give --artifact "
            "(a PEFT or model directory, or base)"
        )
    return run.join(name)


def _with_weights(recipe: Recipe, artifact: str) -> Recipe:
    """Return the recipe that starts from a local ``artifact``; adapters load as they are."""
    update: dict[str, Any] = {"adapter": no_adapter()}
    directory = Path(artifact)
    if artifact == "base":
        pass
    elif (directory / "adapter_config.json").is_file():
        update["base"] = _unpruned(recipe) if BASES.of(recipe).is_of_model(str(directory)) else recipe.base
        if not is_peft(directory):
            update["adapter"] = continuing(directory)
    elif (directory / "config.json").is_file():
        update["model"] = recipe.model.model_copy(update={"name": str(directory), "config": None, "revision": None})
        update["base"] = _unpruned(recipe)
    else:
        raise ModelError(f"--artifact: {artifact} holds neither adapter_config.json nor config.json")
    return recipe.model_copy(update=update)


def _unpruned(recipe: Recipe) -> Any:
    """Return the base of a model directory or a recovered adapter: the full model, rather than a pruned one."""
    return full_base() if BASES.of(recipe).replaces_model else recipe.base

"""The public Python API: what the commands do, as functions. ``import raymem`` gives all of it.

A recipe is given as a :class:`raymem.Recipe`, as the path of a YAML file, or as a plain dict of the same keys. Every
function raises :class:`raymem.errors.RaymemError` for what is the user's to mend, with place, value, rule and cure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymem.planner.types import Plan
from raymem.recipe.schema import Recipe
from raymem.runs.results import EvaluationResult, TrainResult
from raymem.sweeps.result import SweepResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RecipeLike = Recipe | str | Path | Mapping[str, Any]
OnMetrics = Callable[[Sequence[Mapping[str, float]]], None]
"""Called in this process with one or more rows of metrics: step, loss, lr, eval_loss, ..."""


def load_recipe(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check it.

    Args:
        recipe: path of a YAML file, or a plain dict; a Recipe is taken as it is.
        overrides: ``path=value`` as the commands' ``--set`` takes them.

    Raises:
        RecipeError: one line per problem.
    """
    from raymem.recipe import load

    if isinstance(recipe, str | Path):
        return load.load_recipe(Path(recipe), overrides)
    if isinstance(recipe, Recipe):
        return load.recipe_of(recipe.to_dict(), overrides) if overrides else recipe
    return load.recipe_of({"name": "run", **recipe}, overrides)


def plan(recipe: RecipeLike, *, gpu: str | None = None) -> Plan:
    """Predict the peak memory of one worker, per term; needs neither its memory nor a GPU.

    Args:
        gpu: kind of GPU, such as ``H100-80GB``; by default what the recipe says.

    Raises:
        RaymemError: the recipe does not go with its model, or an unknown GPU.
    """
    from raymem.runs.plan import plan_run

    return plan_run(load_recipe(recipe), gpu=gpu)[1]


def train(
    recipe: RecipeLike, *, fresh: bool = False, force: bool = False, on_metrics: Sequence[OnMetrics] = ()
) -> TrainResult:
    """Train a recipe to its end; a run of the same name on the same storage is resumed.

    With ``scaling.num_workers: 0`` in this process, otherwise on Ray workers (a running cluster, or one of its own).

    Args:
        fresh: set an existing run of this name aside and start over.
        force: train even if more is predicted than the recipe's budget.

    Raises:
        RaymemError: the last good checkpoint stays.
    """
    from raymem.runs.train import launch

    return launch(load_recipe(recipe), fresh=fresh, force=force, listeners=list(on_metrics))


def evaluate(recipe: RecipeLike, *, artifact: str | Path | None = None, predictions: int = 0) -> EvaluationResult:
    """Return loss and perplexity over the recipe's evaluation data.

    Args:
        artifact: PEFT or model directory, or ``base`` for the model without an adapter; by default the run's result.
        predictions: so many evaluation examples are continued by the model, greedily.

    Raises:
        RaymemError: no evaluation data, or nothing to evaluate.
    """
    from raymem.runs.evaluate import evaluate_recipe

    named = None if artifact is None else str(artifact)
    return evaluate_recipe(load_recipe(recipe), named, predictions=predictions)


def sweep(
    recipe: RecipeLike,
    space: str | Path | Mapping[str, Any] | None = None,
    *,
    budget: str | int | None = None,
    gpu: str | None = None,
    samples: int = 50,
    metrics: str | Sequence[str] = ("eval_loss",),
    algorithm: str = "tpe",
    name: str | None = None,
    fresh: bool = False,
) -> SweepResult:
    """Search ranks, sparsity and methods; only what is predicted to fit is started. A sweep of the same name goes on.

    Args:
        space: name of a space that ships with raymem (``joint``), path of a Python or YAML file, or its dimensions as
            a dict; by default the recipe's own ``space``.
        budget: memory of one worker's device, such as ``24GiB`` or in bytes; by default the recipe's, or the GPU's.
        gpu: kind of GPU that it is planned for.
        samples: trials to start.
        metrics: what to look for, also metrics of answers (``data.eval.math/numeric``); several look for their Pareto
            front.
        algorithm: ``tpe``, ``nsga2``, ``random`` or ``grid``.
        name: of the sweep; by default the recipe's with ``-sweep``.

    Raises:
        RaymemError: there is no budget, or nothing in the space fits.
    """
    from raymem.sweeps.options import as_argument, resolve_sweep

    loaded = load_recipe(recipe)
    if isinstance(space, Mapping):
        loaded, space = load_recipe({**loaded.to_dict(), "space": dict(space)}), None
    named, dimensions, options = resolve_sweep(
        loaded,
        space=None if space is None else str(space),
        budget=None if budget is None else str(budget),
        gpu=gpu,
        samples=samples,
        metrics=[metrics] if isinstance(metrics, str) else metrics,
        algorithm=algorithm,
        early_stopping=True,
        name=name,
        spelling=as_argument,
    )
    from raymem.sweeps.driver import sweep as run_sweep

    return run_sweep(named, dimensions, options, fresh=fresh)


def merge(adapter: str | Path, output: str | Path) -> Path:
    """Fold an adapter into its base, in the base's own dtype; returns the model directory.

    Raises:
        RaymemError: no adapter there, its base cannot be loaded, or ``output`` exists.
    """
    from raymem.training.artifacts.merge import merge as merge_adapter

    return merge_adapter(adapter, output)


def load(artifact: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in its stored dtype, evaluation mode) and tokenizer of a PEFT or model directory.

    A PEFT adapter computes what plain PEFT computes with it, to the bit.

    Raises:
        RaymemError: it is neither, or the base that the adapter names cannot be loaded.
    """
    from raymem.training.artifacts.load import load_artifact

    return load_artifact(artifact)

"""Evaluates an artefact on tasks by lm-evaluation-harness, which asks a model that raymem has loaded.

The harness has the tasks, their prompts and their metrics; results are those of ``lm_eval --model hf`` with the same
adapter on the same base.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymem.errors import DataError, ModelError, RecipeError
from raymem.methods.probe import first_line
from raymem.recipe.schema import Recipe
from raymem.runs.artifacts import local_copy
from raymem.runs.evaluate import own_artifact
from raymem.runs.resolve import resolve
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import fetch
from raymem.training.reporter import Status

_INSTALL = "pip install 'raymem[eval]'"
_SHOWN = 3


@dataclass(frozen=True)
class Score:
    """One metric of a task."""

    task: str
    metric: str
    """Its name in the harness, with the filter of the answers: ``exact_match,strict-match``."""
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Asked:
    """How tasks are asked.

    Args:
        tasks: names of the harness: tasks, groups, tags or patterns.
        include_path: a directory with tasks of one's own, in the harness's YAML.
        limit: examples of each task; all by default.
        num_fewshot: examples in each prompt; by default what the task says.
        apply_chat_template: ask in the tokenizer's chat template.
        batch_size: requests in a forward pass.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: int = 8


def evaluate_tasks(recipe: Recipe, artifact: str | None, asked: Asked, status: Status) -> list[Score]:
    """Evaluate a run's artefact on tasks, in this process.

    Args:
        artifact: PEFT or model directory; ``base`` is the recipe's model; by default the run's own result.

    Raises:
        RecipeError: the harness is not installed, or it has no such task.
        ModelError: there is nothing to evaluate, or it cannot be loaded.
        DataError: a task's data cannot be had, or its files are wrong.
    """
    names, manager = known_tasks(asked)
    artifact = artifact or own_artifact(recipe)
    directory = _directory(recipe, artifact)
    status("loading the weights")
    model, tokenizer = _loaded(directory)
    if asked.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"--apply-chat-template: the tokenizer of {artifact} has no chat template; leave it out")
    status(f"asking {', '.join(names)}")
    return _scores(model, tokenizer, names, manager, asked)


def known_tasks(asked: Asked) -> tuple[list[str], Any]:
    """Return the tasks that are meant, and the harness's manager of tasks.

    Raises:
        RecipeError: see :func:`evaluate_tasks`.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(f"--tasks needs lm-evaluation-harness ({first_line(error)}); {_INSTALL}") from None
    if asked.include_path is not None and not asked.include_path.is_dir():
        raise RecipeError(f"--include-path: {asked.include_path} is no directory; give the one with your tasks' YAML")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = TaskManager(include_path=None if asked.include_path is None else str(asked.include_path))
    names: list[str] = []
    for pattern in asked.tasks:
        matched = sorted(manager.match_tasks([pattern]))
        if not matched:
            near = difflib.get_close_matches(pattern, manager.all_tasks, n=_SHOWN)
            cure = f"near names: {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
            raise RecipeError(f"--tasks: {pattern!r} is no task of lm-evaluation-harness; {cure}")
        names += [name for name in matched if name not in names]
    return names, manager


def _directory(recipe: Recipe, artifact: str) -> str:
    """Return a local directory of the artefact, or of the model that the recipe names."""
    run = resolve(recipe, artifact=artifact)
    if artifact != "base":
        return local_copy(artifact)
    model = run.recipe.model
    if model.name is None:
        raise ModelError("--artifact base: the recipe's model starts from random weights, which answer nothing")
    return str(fetch(model.name, model.revision, DistEnv(), weights_too=True))


def _loaded(directory: str) -> tuple[Any, Any]:
    import torch

    from raymem.training.artifacts.load import load_artifact

    model, tokenizer = load_artifact(directory)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _scores(model: Any, tokenizer: Any, names: Sequence[str], manager: Any, asked: Asked) -> list[Score]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    asking = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=asked.batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=asking,
            tasks=list(names),
            num_fewshot=asked.num_fewshot,
            limit=asked.limit,
            apply_chat_template=asked.apply_chat_template,
            task_manager=manager,
            log_samples=False,
        )
    except Exception as error:  # a task's data come from the hub or from files of anybody
        raise DataError(f"--tasks: {', '.join(names)} cannot be asked ({first_line(error)}); check its data") from None
    assert found is not None
    return [
        Score(task, metric, float(value), _number(figures.get(_stderr(metric))))
        for task, figures in found["results"].items()
        for metric, value in figures.items()
        if isinstance(value, int | float) and "," in metric and "_stderr," not in metric
    ]


def _stderr(metric: str) -> str:
    name, _, kept = metric.partition(",")
    return f"{name}_stderr,{kept}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None

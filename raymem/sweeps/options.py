"""Defines the options of a sweep, checks them, and names them in errors as the caller knows them. Light to import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raymem.errors import BudgetError, RecipeError
from raymem.recipe.load import parse_recipe
from raymem.recipe.schema import Recipe
from raymem.recipe.sentences import nearest
from raymem.recipe.space import Space
from raymem.recipe.space_load import load_space
from raymem.runs.plan import budget_bytes

ALGORITHMS = ("tpe", "nsga2", "random", "grid")
METRICS = {"eval_loss": "min", "loss": "min", "peak_bytes": "min", "train_s": "min", "tokens_per_s": "max"}
"""Maps each metric that any trial reports and a sweep can optimise to the better direction."""
_OF_ANSWERS = "data.eval"


def is_score(metric: str) -> bool:
    """Say whether a metric is one of the model's own answers: ``data.eval.math/numeric``."""
    return metric.startswith(_OF_ANSWERS) and "/" in metric


def better(metric: str) -> str:
    """Return the better direction of a metric, ``min`` or ``max``; more right answers are better."""
    return "max" if is_score(metric) else METRICS[metric]


class Spelling(Protocol):
    """A function that writes an argument, with a value or without, as the caller would give it."""

    def __call__(self, name: str, value: Any = None) -> str:
        """Write the metrics for an error's sentence."""


def as_option(name: str, value: Any = None) -> str:
    """Write an option as on the command line: ``--budget 24GiB``, ``--fresh``."""
    option = f"--{'objective' if name == 'metrics' else name.replace('_', '-')}"
    return option if value is None or value is True else f"{option} {value}"


def as_argument(name: str, value: Any = None) -> str:
    """Write an option as in Python: ``budget='24GiB'``, ``fresh=True``."""
    return name if value is None else f"{name}={value!r}"


@dataclass(frozen=True)
class Objective:
    """The metrics that a sweep optimises."""

    metrics: tuple[str, ...]
    """Keys of :data:`METRICS`, or metrics of the recipe's evaluation sources; the first one chooses among the best."""

    @property
    def has_scores(self) -> bool:
        """Whether trials have to answer the evaluation data."""
        return any(map(is_score, self.metrics))


@dataclass(frozen=True)
class SweepOptions:
    """The options of a search."""

    budget_bytes: int
    """Memory of one worker's device."""
    samples: int = 50
    """Trials to start; refused proposals do not count."""
    objective: Objective = field(default_factory=lambda: Objective(("eval_loss",)))
    algorithm: str = "tpe"
    """One of :data:`ALGORITHMS`."""
    early_stopping: bool = True
    """Whether trials that are clearly worse at their evaluations are stopped (ASHA); never with several objectives, or
    one of answers, which are judged at the end."""
    gpu: str | None = None
    """The kind of GPU, for the planner."""
    spelling: Spelling = as_option
    """The spelling of these options in errors."""


def resolve_sweep(
    recipe: Recipe,
    *,
    space: str | None,
    budget: str | None,
    gpu: str | None,
    samples: int,
    metrics: Sequence[str],
    algorithm: str,
    early_stopping: bool,
    name: str | None,
    spelling: Spelling,
) -> tuple[Recipe, Space, SweepOptions]:
    """Return the recipe of the sweep under its own name, its space, and the options of the search.

    Raises:
        RaymemError: an option that no sweep can work with.
    """
    limit = budget_bytes(recipe, budget, gpu, where=spelling("budget"))
    if limit is None:
        examples = f"{spelling('budget', '24GiB')}, {spelling('gpu', 'H100-80GB')}"
        raise BudgetError(f"there is no budget to search under; give {examples}, or `budget`")
    dimensions = load_space(space, recipe, given_as=spelling("space"))
    objective = Objective(tuple(dict.fromkeys(metrics)))
    check_metrics(objective, recipe, spelling)
    if algorithm not in ALGORITHMS:
        raise RecipeError(f"{spelling('algorithm')} {algorithm}: there is no such one{nearest(algorithm, ALGORITHMS)}")
    if samples < 1:
        raise RecipeError(f"{spelling('samples', samples)}: nothing would be tried; give at least 1")
    options = SweepOptions(limit, samples, objective, algorithm, early_stopping, gpu, spelling)
    return parse_recipe({**recipe.to_dict(), "name": sweep_name(recipe, name)}, spelling("name")), dimensions, options


def sweep_name(recipe: Recipe, name: str | None) -> str:
    """Name of the sweep, which is a run of its own."""
    return name or f"{recipe.name[:57]}-sweep"


def trial_name(sweep: str, key: str, number: int) -> str:
    """Name of a trial's run, which lies beside the sweep.

    Args:
        key: tells trials from those of an earlier sweep of the same name (``sweep.json`` holds it).
    """
    return f"{sweep[:53]}-{key}-{number:04d}"


def check_metrics(objective: Objective, recipe: Recipe, spelling: Spelling) -> None:
    """Refuse metrics that no trial of a recipe reports.

    Raises:
        RecipeError: one of them, or there is none.
    """
    known = [*METRICS, *recipe.data.score_names]
    if not objective.metrics:
        raise RecipeError(f"{spelling('metrics')}: names nothing to look for; give one or more of {', '.join(known)}")
    for name in objective.metrics:
        if name not in known:
            cure = f"; a source of data.eval reports {name} if it has that metric" if is_score(name) else ""
            raise RecipeError(f"objective {name!r}: no trial reports that{nearest(name, known)}{cure}")

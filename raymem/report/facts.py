"""Reads what a run left in its directory, as plain values for its page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from raymem.errors import RaymemError, StorageError
from raymem.memory.trace import CATEGORIES
from raymem.planner import Plan, plan_many
from raymem.recipe.schema import Recipe
from raymem.report.find import Place
from raymem.runs.record import DATA, PLAN, PREDICTIONS, SCORES
from raymem.storage.storage import Storage
from raymem.training.artifacts.facts import FACTS
from raymem.training.checkpoint import latest_recipe
from raymem.training.data.summary import Part
from raymem.training.history import read_history
from raymem.training.reporter import Row

Status = Callable[[str], None]

MOST_RUNS = 8
"""Runs that one page compares: as many curves can be told apart without colour."""
HELD = "held_bytes/"
_EVALUATIONS = "loram/evaluate.json"
_ALL = 2**62
_PLAN_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Prediction:
    """What the model answered, beside what it should have."""

    prompt: str
    prediction: str
    reference: str


@dataclass(frozen=True)
class Example:
    """An example of the training data."""

    parts: list[Part]
    left_out: int
    """Characters that were not kept."""


@dataclass(frozen=True)
class Source:
    """The figures of a source of data; see :class:`raymem.training.data.summary.SourceSummary`."""

    path: str
    num_read: int
    num_kept: int
    dropped: dict[str, int]
    truncated: int
    num_tokens: int
    num_targets: int
    how: str = ""


@dataclass(frozen=True)
class Data:
    """The data of a run."""

    train: list[Source]
    eval: list[Source]
    examples: list[Example]


@dataclass(frozen=True)
class PlannedMemory:
    """The prediction for one worker."""

    terms: dict[str, int]
    """Maps each term to its bytes at the peak of an optimizer step, which is what a run measures."""
    whole_peak_bytes: int
    """The highest peak over all phases, such as evaluation."""
    capacity_bytes: int
    """The least memory that the device must have."""
    is_traced: bool
    made_now: bool
    """False if the run began with it."""

    @property
    def peak_bytes(self) -> int:
        """The peak of a step."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class RunFacts:
    """A run, as far as its directory tells."""

    name: str
    place: str
    recipe: dict[str, Any]
    """The resolved recipe as plain values; empty if nothing holds it yet."""
    rows: list[Row]
    is_finished: bool
    """Whether its result is there."""
    result_step: int | None
    """The step whose weights are the result."""
    peak_bytes: int | None
    """Measured peak of a step, the highest over all workers."""
    held: dict[str, int]
    """Measured bytes that the first worker keeps between steps, by term."""
    data: Data | None
    plan: PlannedMemory | None
    plan_problem: str | None
    """Why there is no plan."""
    predictions: list[Prediction] = field(default_factory=list)
    evaluations: dict[str, float] = field(default_factory=dict)
    """Evaluation loss of the full and the pruned model, without and with the adapter, if these were compared."""

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.rows[-1]["step"]) if self.rows else self.result_step or 0

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)


def read_run(place: Place) -> RunFacts:
    """Read a run; nothing is computed but what its files say.

    Raises:
        StorageError: a file cannot be read, or is not as it was written.
    """
    run = place.directory
    facts = next((run.read_object(f"{name}/{FACTS}") for name in ("adapter", "model") if _has(run, name)), None)
    recipe = facts["recipe"] if facts is not None and isinstance(facts.get("recipe"), dict) else latest_recipe(run)
    scores = run.read_record(SCORES) if run.exists(SCORES) else {}
    history = [{**row, **scores.get(str(int(row["step"])), {})} for row in read_history(run, _ALL)]
    rows = [{name: float(value) for name, value in row.items() if _is_number(value)} for row in history]
    measured = [row["peak_bytes"] for row in rows if "peak_bytes" in row]
    known = facts.get("peak_bytes") if facts is not None else None
    held_rows = [row for row in rows if any(name.startswith(HELD) for name in row)]
    held = {name.removeprefix(HELD): int(v) for name, v in (held_rows or [{}])[-1].items() if name.startswith(HELD)}
    return RunFacts(
        name=place.name,
        place=run.path,
        recipe=recipe or {},
        rows=rows,
        is_finished=facts is not None,
        result_step=None if facts is None else facts.get("step"),
        peak_bytes=int(max([*measured, known if isinstance(known, int) else 0])) or None,
        held=held,
        data=_read_data(run),
        plan=_read_plan(run),
        plan_problem=None,
        predictions=_read_predictions(run),
        evaluations=_read_evaluations(run),
    )


def with_plans(runs: Sequence[RunFacts], status: Status) -> list[RunFacts]:
    """Plan the runs that recorded no plan, as those without a budget, in one process."""
    recipes: dict[int, Recipe] = {}
    problems: dict[int, str] = {}
    for index, run in enumerate(runs):
        if run.plan is not None:
            continue
        try:
            recipes[index] = Recipe.model_validate(run.recipe)
        except ValueError:
            problems[index] = (
                "its recipe is not one of this version of raymem" if run.recipe else "it has no recipe yet"
            )
    if recipes:
        status(f"predicting the memory of {', '.join(runs[index].name for index in recipes)}")
        answers: Sequence[Plan | Exception]
        try:
            answers = plan_many(list(recipes.values()), timeout_s=_PLAN_TIMEOUT_S)
        except RaymemError as error:
            answers = [error] * len(recipes)
        planned = dict(zip(recipes, answers, strict=True))
    else:
        planned = {}
    finished = []
    for index, run in enumerate(runs):
        answer = planned.get(index)
        if isinstance(answer, Plan):
            run = replace(run, plan=_planned(answer.to_dict(), made_now=True))
        elif index in problems or answer is not None:
            run = replace(run, plan_problem=problems.get(index, str(answer)))
        finished.append(run)
    return finished


def _has(run: Storage, artifact: str) -> bool:
    return run.exists(f"{artifact}/{FACTS}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_data(run: Storage) -> Data | None:
    if not run.exists(DATA):
        return None
    values = run.read_record(DATA, {"train": (list,), "examples": (list,)})
    with _malformed(run, DATA):
        return Data(
            train=[_source(one) for one in values["train"]],
            eval=[_source(one) for one in values.get("eval", [])],
            examples=[Example([Part(**part) for part in one["parts"]], one["left_out"]) for one in values["examples"]],
        )


def _source(plain: dict[str, Any]) -> Source:
    return Source(**{each.name: plain[each.name] for each in fields(Source) if each.name in plain})


def _read_plan(run: Storage) -> PlannedMemory | None:
    if not run.exists(PLAN):
        return None
    values = run.read_record(PLAN, {"terms": (dict,), "phases": (dict,)})
    with _malformed(run, PLAN):
        return _planned(values, made_now=False)


def _planned(plan: dict[str, Any], *, made_now: bool) -> PlannedMemory:
    steps = [plan["phases"][name] for name in ("forward", "backward", "step") if name in plan["phases"]]
    terms = max(steps, key=lambda phase: phase["peak_bytes"]) if steps else plan["terms"]
    return PlannedMemory(
        {name: int(terms.get(name, 0)) for name in CATEGORIES},
        int(plan["peak_bytes"]), int(plan["capacity_bytes"]), bool(plan["traced"]), made_now,
    )  # fmt: skip


def _read_predictions(run: Storage) -> list[Prediction]:
    if not run.exists(PREDICTIONS):
        return []
    values = run.read_record(PREDICTIONS, {"predictions": (list,)})
    with _malformed(run, PREDICTIONS):
        return [
            Prediction(*(str(one[name]) for name in ("prompt", "prediction", "reference")))
            for one in values["predictions"]
        ]


def _read_evaluations(run: Storage) -> dict[str, float]:
    if not run.exists(_EVALUATIONS):
        return {}
    with _malformed(run, _EVALUATIONS):
        rows = run.read_record(_EVALUATIONS).items()
        return {name: float(row["loss"]) for name, row in rows if isinstance(row, dict)}


@contextlib.contextmanager
def _malformed(run: Storage, name: str) -> Iterator[None]:
    """Name the file whose values are not those that this version writes."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{run.join(name)}: not as this version of raymem writes it ({error}); delete it, and the page is made "
            "without it"
        ) from None

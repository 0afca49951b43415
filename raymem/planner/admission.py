"""Decides whether a recipe may be tried at all, by its budget and before anything is started."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

from raymem.errors import RaymemError, RecipeError
from raymem.memory.budget import bytes_text
from raymem.planner import prediction_error
from raymem.planner.micro_batch import with_micro_batch
from raymem.planner.process import Planner, without_free
from raymem.planner.types import Above, Target
from raymem.recipe.axes import MEMORY_AXES
from raymem.recipe.schema import Recipe

_GROWS = {"train": ("micro_batch",), "data": ("sequence_length",)}
"""Maps a section to those of its options that never lower memory when they grow, as ``grows`` does for a kind."""


@dataclass(frozen=True)
class Admit:
    """The verdict on a recipe that fits the budget."""

    step_peak_bytes: int
    """The predicted peak of a step, which the run's meter will show."""
    needed_bytes: int
    """The memory that the device must have."""


@dataclass(frozen=True)
class Reject:
    """The verdict on a recipe that must not be tried."""

    reason: str
    needed_bytes: int | None
    """The memory that the device must have at least; None if the recipe cannot be planned at all."""
    excess: float
    """How far the recipe is above the budget, as a share of it."""


Decision = Admit | Reject


class AdmissionController:
    """Judges recipes against one budget.

    A recipe costs nothing if it is larger in every way than one that was refused, or was planned before (plans are
    remembered over processes). A step is traced no further than to the end of the phase that is above the budget, and
    not at all where the closed forms are.

    Args:
        budget_bytes: of one worker's device.
        gpu: kind of GPU, see :func:`raymem.planner.plan_recipe`.
    """

    def __init__(self, budget_bytes: int, *, gpu: str | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.planner = Planner(gpu=gpu)
        self._refused: list[tuple[dict[str, Any], dict[str, float], Reject]] = []

    def __enter__(self) -> AdmissionController:
        return self

    def __exit__(self, *_: object) -> None:
        self.planner.__exit__()

    def warm_up(self, recipe: Recipe) -> None:
        """Start the planner ahead of many questions; a recipe that cannot be planned does no harm."""
        with contextlib.suppress(RaymemError):
            self.planner.warm_up(with_micro_batch(recipe, 1))  # it may be open: auto

    def judge(self, recipe: Recipe) -> Decision:
        """Admit or refuses a recipe; nothing is raised for one that cannot be planned."""
        if recipe.train.micro_batch == "auto":
            return Reject("train.micro_batch: auto is for single runs; give a number, or search over it", None, 1.0)
        rest, amounts = _split(recipe)
        for other, least, refused in self._refused:
            if other == rest and all(amounts[name] >= amount for name, amount in least.items()):
                return dataclasses.replace(refused, reason=f"as large as another that was refused: {refused.reason}")
        try:
            judged = self._judge(recipe)
        except RecipeError as error:
            return Reject(str(error), None, 1.0)
        if isinstance(judged, Reject):
            self._refused.append((rest, amounts, judged))
        return judged

    def needed_bytes(self, recipe: Recipe) -> int:
        """Return the memory that the device must have, corrected by past errors. Raises RaymemError."""
        return int(self.planner.plan(recipe).capacity_bytes * self._margin(recipe))

    def _judge(self, recipe: Recipe) -> Decision:
        try:
            margin = self._margin(recipe)
            plan = self.planner.plan_within(recipe, int((self.budget_bytes + 1) / margin))
        except RecipeError:
            raise
        except RaymemError as error:
            return Reject(str(error), None, 1.0)
        if isinstance(plan, Above):
            held = plan.phase == "load"
            what = "weights, gradients and states alone take" if held else "a step is predicted to take at least"
            return self._too_large(int(plan.at_least_bytes * margin), what)
        needed = int(plan.capacity_bytes * margin)
        if needed > self.budget_bytes:
            return self._too_large(needed, "a step is predicted to take")
        return Admit(plan.step_peak_bytes, needed)

    def _too_large(self, num_bytes: int, what: str) -> Reject:
        reason = f"{what} {bytes_text(num_bytes)}, above the budget of {bytes_text(self.budget_bytes)}"
        return Reject(reason, num_bytes, num_bytes / self.budget_bytes - 1)

    def _margin(self, recipe: Recipe) -> float:
        """Return the factor by which the worst run of these methods went above its prediction; at least 1."""
        return max(1.0, prediction_error.highest(recipe) or 1.0)


def _split(recipe: Recipe) -> tuple[dict[str, Any], dict[str, float]]:
    """Split a recipe into what two recipes must share to be compared, and the amounts that compare them.

    A recipe that has at least as much of each as one that was too large, and is the same otherwise, is too large too.
    """
    rest, amounts = without_free(recipe.to_dict()), {}
    for section, options in {**_GROWS, **{name: axis.of(recipe).grows for name, axis in MEMORY_AXES.items()}}.items():
        for option in options:
            value = rest[section].get(option)
            if isinstance(value, int | float):
                amounts[f"{section}.{option}"] = float(value)
                rest[section][option] = type(value).__name__  # 1 column and the fraction 1.0 are not the same
    # Whether gradients stay while another micro-batch passes matters more than the size of that.
    rest["accumulates"] = recipe.train.global_batch > recipe.train.rows_per_pass * max(1, Target.of(recipe).num_workers)
    return rest, amounts

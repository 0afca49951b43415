"""Plans as plain values; free of torch, so that a plan that is known already is shown at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from raymem.memory.budget import Verdict, parse_bytes, verdict
from raymem.recipe.schema import Recipe


@dataclass(frozen=True)
class Target:
    """The device and number of workers that a recipe is planned for."""

    kind: str
    """``cpu`` or ``cuda``."""
    num_workers: int

    @staticmethod
    def of(recipe: Recipe) -> Target:
        """The recipe's device, and the fewest workers of an elastic range, since their shards are the largest."""
        return Target("cuda" if recipe.scaling.use_gpu else "cpu", max(1, recipe.scaling.least_workers))


@dataclass(frozen=True)
class Above:
    """In place of a plan: the recipe needs more than the limit that it was planned with, and planning ended there."""

    at_least_bytes: int
    """The device must have at least this much."""
    phase: str
    """The phase that takes that much (:data:`raymem.memory.trace.PHASES`); ``load`` if what is always there does."""


@dataclass(frozen=True)
class Plan:
    """Prediction for one worker."""

    device: str
    """``cpu`` or ``cuda``."""
    gpu: str | None
    """Name in :data:`raymem.memory.devices.GPUS`, if one was given."""
    num_workers: int
    traced: bool
    """False for a rough figure by formulas, where the model's code could not be traced."""
    note: str | None
    """Why it was not traced."""
    peak_bytes: int
    """Highest sum of what is allocated, over all phases."""
    step_peak_bytes: int
    """The same over an optimizer step alone: what a run's meter measures."""
    terms: dict[str, int]
    """Category -> bytes at the peak."""
    term_peaks: dict[str, int]
    """Category -> most bytes of it at any moment, which may be another one than the peak."""
    phases: dict[str, dict[str, int]]
    """Phase -> category -> bytes at the peak of that phase, and ``peak_bytes``."""
    state: dict[str, int]
    """Category -> bytes of weights, trainable, gradients and optimizer when all are there."""
    reserved_bytes: int
    """Bytes that the caching allocator takes from an empty device; on CPU the peak."""
    capacity_bytes: int
    """The least memory of a device on which the run survives: the allocator's, and what lies outside of it."""
    expandable_bytes: int
    """``reserved_bytes`` with expandable segments."""
    outside_bytes: int
    """CUDA context and NCCL, which are no part of the allocator."""
    top: list[dict[str, Any]]
    """The largest holders at the peak: name, category, operation, bytes, count."""
    timeline: list[dict[str, Any]]
    """Over the measured step and what follows it: phase and bytes by category."""
    seconds: float = 0.0
    """Seconds that planning took."""
    config_source: str = "model"
    """``model``, or ``shipped`` if raymem's own shape of it was planned, since the Hub could not be asked."""
    config_note: str | None = None
    """Why it is the shipped one, in a sentence."""
    loss_note: str | None = None
    """Why ``loss: auto`` is ``full`` for this model, in a sentence."""
    trained: list[str] = field(default_factory=list)
    """What is trained, quantised and left alone, and why, in lines."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def fits(self, budget: str | int) -> bool:
        """Whether a worker's device with so much memory (``24GiB``, or bytes) is enough. Raises ValueError."""
        return self.capacity_bytes <= (parse_bytes(budget) if isinstance(budget, str) else budget)

    def verdict(self, budget_bytes: int) -> Verdict:
        """Compare with a budget per worker device."""
        from raymem.planner.help import would_help

        return verdict(self.capacity_bytes, budget_bytes, self.terms, would_help)

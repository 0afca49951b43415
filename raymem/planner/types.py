"""Defines plans as plain values, free of torch, so that a plan that is known already is shown at once."""

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
        """Take the recipe's device, and the fewest workers of an elastic range, since their shards are the largest."""
        return Target("cuda" if recipe.scaling.use_gpu else "cpu", max(1, recipe.scaling.least_workers))


@dataclass(frozen=True)
class RowFacts:
    """What a step's memory depends on in the rows of a run, where its data is known."""

    masked: bool
    """Attention needs a mask somewhere: for several examples in a row, or for padding."""
    most_targets: int
    """The largest number of targets in a micro-batch."""


@dataclass(frozen=True)
class Above:
    """Stands in for a plan of a recipe that needs more than the limit given: planning ended there."""

    at_least_bytes: int
    """The memory that the device must have at least."""
    phase: str
    """The phase that takes that much (:data:`raymem.memory.trace.PHASES`); ``load`` if what is always there does."""


@dataclass(frozen=True)
class Plan:
    """Prediction for one worker."""

    device: str
    """``cpu`` or ``cuda``."""
    gpu: str | None
    """The name in :data:`raymem.memory.devices.GPUS`, if one was given."""
    num_workers: int
    traced: bool
    """False for a rough figure by formulas, where the model's code could not be traced."""
    note: str | None
    """The reason why the recipe was not traced."""
    peak_bytes: int
    """The highest sum of allocated bytes over all phases."""
    step_peak_bytes: int
    """The highest sum over an optimizer step alone, which a run's meter measures."""
    terms: dict[str, int]
    """Maps each category to its bytes at the peak."""
    term_peaks: dict[str, int]
    """Maps each category to its most bytes at any moment, which may be another one than the peak."""
    phases: dict[str, dict[str, int]]
    """Maps each phase to the bytes of each category at its peak, and to ``peak_bytes``."""
    state: dict[str, int]
    """Bytes of weights, trainable, gradients and optimizer by category, when all are there."""
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
    """Phase and bytes by category over the measured step and what follows it."""
    seconds: float = 0.0
    """Seconds that planning took."""
    config_source: str = "model"
    """``model``, or ``shipped`` if raymem's own shape of it was planned, since the Hub could not be asked."""
    config_note: str | None = None
    """A sentence that says why the shape is the shipped one."""
    loss_note: str | None = None
    """A sentence that says why ``loss: auto`` is ``full`` for this model."""
    trained: list[str] = field(default_factory=list)
    """Lines that say what is trained, quantised and left alone, and why."""
    host_bytes: int = 0
    """The most bytes that lie in the memory of the host because the recipe moves them there. On a CPU they are part of
    ``peak_bytes`` too, on a GPU they are not."""
    host_terms: dict[str, int] = field(default_factory=dict)
    """Maps each category to its bytes on the host when these are the most; empty if nothing lies there."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def fits(self, budget: str | int) -> bool:
        """Say whether a worker's device with so much memory (``24GiB``, or bytes) is enough. Raises ValueError."""
        return self.capacity_bytes <= (parse_bytes(budget) if isinstance(budget, str) else budget)

    def verdict(self, budget_bytes: int, recipe: Recipe) -> Verdict:
        """Compare the plan with a budget per worker device.

        Args:
            recipe: the one that was planned, so that nothing is proposed that it has already.
        """
        from raymem.planner.help import would_help

        return verdict(self.capacity_bytes, budget_bytes, self.terms, lambda term: would_help(term, recipe))

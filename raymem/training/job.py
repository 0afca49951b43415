"""Defines the work that a driver hands to workers: a prepared run, or a job in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.training.data.packed.shards import Prepared
from raymem.training.dist_env import DistEnv


@dataclass(frozen=True)
class PreparedRun:
    """A resolved run with its data tokenised and packed: all that the first step needs."""

    recipe: Recipe
    storage: Storage
    run: Storage
    """The run's own directory in the storage."""
    train_data: Prepared
    eval_data: Prepared | None
    predicted_peak_bytes: int | None = None
    """What the planner says, where it was asked; the result tells it beside what was measured."""


class Doing(Protocol):
    """Learns what a worker does from now on, see :meth:`raymem.training.reporter.Reporter.progress`."""

    def __call__(self, what: str, *, brief: bool = True, told: bool = False) -> None: ...


Value_co = TypeVar("Value_co", covariant=True)


class GroupTask(Protocol[Value_co]):
    """A function at the top of a module that every rank of a group calls alike; takes and returns plain data."""

    def __call__(self, config: dict[str, Any], dist_env: DistEnv, doing: Doing, /) -> Value_co: ...


class StepJob(Protocol):
    """Work in steps, of which each may be done in another process, and again after its process died.

    A step is plain data with ``name`` and ``after``, the names of the steps that come before it.
    """

    what: str
    """The name of the job, for errors."""

    def is_committed(self) -> bool:
        """Say whether all steps are done."""

    def steps(self) -> Sequence[Any]:
        """Return all steps, in an order in which they can be done."""

    def is_done(self, step: Any) -> bool:
        """Say whether a step's result is there, whole."""

    def memory_bytes(self, step: Any) -> int:
        """Return the most bytes that a step holds."""

    def run(self, step: Any) -> None:
        """Do a step, or nothing if it is done.

        Raises:
            RaymemError: it cannot be done; it would not help to try again.
        """

    def commit(self) -> object:
        """Make the result of all steps appear."""

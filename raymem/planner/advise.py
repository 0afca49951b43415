"""Finds the single changes of a recipe, or if need be the few together, that make it fit."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from types import TracebackType

from raymem.errors import RaymemError, RecipeError
from raymem.kinds import Advice
from raymem.memory.budget import bytes_text
from raymem.planner.help import changes
from raymem.planner.process import Planner
from raymem.planner.types import Above, Plan
from raymem.recipe.schema import Recipe

_MOST_TOGETHER = 3
_PROCESSES = 2
"""Planning processes at most; each takes about half a GiB."""

Load = Callable[[Sequence[str]], Recipe]
"""Reads the recipe with further overrides.

Raises:
    RecipeError: they do not go together.
"""


@dataclass(frozen=True)
class Tried:
    """A recipe with some changes, planned."""

    changes: tuple[Advice, ...]
    plan: Plan | Above
    """:class:`~raymem.planner.types.Above` where planning ended as soon as it was clear that it does not fit."""
    budget_bytes: int

    @property
    def overrides(self) -> tuple[str, ...]:
        """The changes, as ``--set`` takes them."""
        return tuple(change.override for change in self.changes)

    @property
    def is_exact(self) -> bool:
        """Whether training gives the same result with them, up to rounding."""
        return all(change.exact for change in self.changes)

    @property
    def needed_bytes(self) -> int:
        """The memory that the device must have; at least, if the plan was not finished."""
        return self.plan.at_least_bytes if isinstance(self.plan, Above) else self.plan.capacity_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.budget_bytes

    def __str__(self) -> str:
        needs = f"needs {'more than ' if isinstance(self.plan, Above) else ''}{bytes_text(self.needed_bytes)}"
        return f"{' '.join(self.overrides)}: {needs}, {'fits' if self.fits else 'does not fit'}"


Report = Callable[[str], None]
"""Told in a line what each recipe needs, as soon as that is known."""


def advise(
    load: Load, plan: Plan, budget_bytes: int, gpu: str | None = None, *, report: Report = lambda _: None
) -> list[Tried]:
    """Find changes after which the recipe fits: those that leave the result of training as it is first, and of these
    the fewest together, those that need least first.

    Each change is tried alone. If no exact one is enough, exact ones are tried together, each time with the one that
    needed least so far; if nothing fits then, all kinds of changes are. What cannot be enough, since the terms that it
    lowers hold less than is missing, is planned only if that is so of all.

    Args:
        load: reads the recipe.
        plan: of the recipe as it is.
        budget_bytes: per worker device.
        gpu: as for :func:`raymem.planner.plan_recipe`.
    """
    with _Planners(gpu) as planners:
        search = _Search(load, budget_bytes, planners, report)
        tried = search.round((), plan)
        if not any(one.fits for one in tried if one.is_exact):
            tried += search.together([one for one in tried if one.is_exact], exact=True)
        # The best of all may leave nothing to add where the best approximate one does.
        for start in (tried, [one for one in tried if not one.is_exact]):
            if not any(one.fits for one in tried):
                tried = [*tried, *search.together(start, exact=False)]
    fitting = [one for one in tried if one.fits]
    return sorted(fitting, key=lambda one: (not one.is_exact, len(one.changes), one.needed_bytes))


class _Search:
    def __init__(self, load: Load, budget_bytes: int, planners: _Planners, report: Report) -> None:
        self._load, self._budget_bytes, self._planners, self._report = load, budget_bytes, planners, report

    def together(self, tried: Sequence[Tried], *, exact: bool) -> list[Tried]:
        """Add changes to the best of those tried, one at a time, until something fits or nothing is left to add."""
        more: list[Tried] = []
        latest = tried
        while latest:
            best = min(latest, key=lambda one: one.needed_bytes)
            if len(best.changes) == _MOST_TOGETHER:
                break
            latest = self.round(best.changes, best.plan, exact_only=exact)
            more += latest
            if any(one.fits for one in latest):
                break
        return more

    def round(self, chosen: tuple[Advice, ...], plan: Plan | Above, *, exact_only: bool = False) -> list[Tried]:
        """Plan the recipe with each further change."""
        overrides = [change.override for change in chosen]
        combined: list[tuple[tuple[Advice, ...], Recipe]] = []
        for change in changes(self._load(overrides)):
            if not change.is_planned or (exact_only and not change.exact):
                continue
            if any(_same_section(change, other) for other in chosen):
                continue
            try:
                combined.append(((*chosen, change), self._load([*overrides, change.override])))
            except RecipeError:
                continue
        promising = [one for one in combined if not self._is_hopeless(one[0][-1], plan)]
        combined = promising or combined  # together they may be enough where none is alone
        tried = []
        for together, result in self._planners.plan(combined, self._budget_bytes):
            if isinstance(result, RaymemError):  # as of a change that does not go with the model
                self._report(f"{' '.join(change.override for change in together)}: cannot be planned: {result}")
                continue
            tried.append(Tried(together, result, self._budget_bytes))
            self._report(str(tried[-1]))
        return tried

    def _is_hopeless(self, change: Advice, plan: Plan | Above) -> bool:
        """Say whether a change cannot be enough even if it did away with its terms, and with all temporaries."""
        if isinstance(plan, Above) or not (plan.traced and change.terms):
            return False
        # Of weights that are no longer trained the inputs need not be saved.
        lowered = {*change.terms, "workspace", *(["activations"] if "trainable" in change.terms else [])}
        kept = plan.peak_bytes - sum(plan.terms[term] for term in lowered)
        return kept + plan.outside_bytes > self._budget_bytes


def _same_section(change: Advice, other: Advice) -> bool:
    """Say whether one of two changes undoes the other."""
    here, there = (item.override.partition("=")[0] for item in (change, other))
    return f"{here}.".startswith(f"{there}.") or f"{there}.".startswith(f"{here}.")


class _Planners:
    """Planning processes side by side, which start when they are needed."""

    def __init__(self, gpu: str | None) -> None:
        count = min(_PROCESSES, len(os.sched_getaffinity(0)))
        self._planners = [Planner(gpu=gpu) for _ in range(count)]
        self._idle: queue.SimpleQueue[Planner] = queue.SimpleQueue()
        for planner in self._planners:
            self._idle.put(planner)
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> _Planners:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # nobody waits for what is being planned
            for planner in self._planners:
                planner.abandon()
        self._threads.shutdown(cancel_futures=True)
        for planner in self._planners:
            planner.__exit__()

    def plan(
        self, recipes: Iterable[tuple[tuple[Advice, ...], Recipe]], limit_bytes: int
    ) -> Iterator[tuple[tuple[Advice, ...], Plan | Above | RaymemError]]:
        """Yield what each recipe comes to, in the order in which it is known."""
        futures: dict[Future[Plan | Above | RaymemError], tuple[Advice, ...]] = {
            self._threads.submit(self._plan, recipe, limit_bytes): together for together, recipe in recipes
        }
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _plan(self, recipe: Recipe, limit_bytes: int) -> Plan | Above | RaymemError:
        planner = self._idle.get()
        try:
            return planner.plan_within(recipe, limit_bytes)
        except RaymemError as error:
            return error
        finally:
            self._idle.put(planner)

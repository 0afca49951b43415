"""The tracking systems by the name that a recipe gives them. A kind's code is imported once a run asks for it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymem.recipe.base import Section
from raymem.recipe.schema import MlflowTracking, NoTracking
from raymem.tracking.tracker import RunStart, Tracker


@dataclass(frozen=True)
class TrackerKind:
    """One kind of ``tracking``."""

    options: type[Section]
    """Section of the recipe: its fields are the kind's options."""
    implementation: str
    """``module:class`` of its :class:`raymem.tracking.tracker.Tracker`."""

    def load(self) -> type[Tracker]:
        """The class."""
        module, _, name = self.implementation.partition(":")
        tracker: type[Tracker] = getattr(importlib.import_module(module), name)
        return tracker


KINDS = {
    "mlflow": TrackerKind(MlflowTracking, "raymem.tracking.mlflow_tracker:MlflowTracker"),
    "none": TrackerKind(NoTracking, "raymem.tracking.tracker:NullTracker"),
}
"""Value of ``tracking.kind`` -> kind."""


def start_tracking(start: RunStart) -> Tracker:
    """The tracker that a recipe asks for, started.

    Raises:
        TrackingError: it cannot be used as the recipe says.
    """
    return KINDS[start.recipe["tracking"]["kind"]].load().start(start)


def attach_tracker(kind: str, spec: Mapping[str, Any]) -> Tracker:
    """The tracker of a run that was started in another process; nothing is contacted yet."""
    return KINDS[kind].load().attach(spec)


def check_tracking(options: Mapping[str, Any], storage_path: str) -> str:
    """Whether a run with these options could start, in words for a report.

    Raises:
        TrackingError: as :func:`start_tracking`.
    """
    return KINDS[options["kind"]].load().check(options, storage_path)

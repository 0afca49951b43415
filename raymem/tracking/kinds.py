"""Starts trackers of the kind that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymem.recipe.axes import TRACKERS
from raymem.tracking.tracker import RunStart, Tracker


def start_tracking(start: RunStart) -> Tracker:
    """Start the tracker that a recipe asks for.

    Raises:
        TrackingError: it cannot be used as the recipe says.
    """
    tracker: Tracker = TRACKERS[start.recipe["tracking"]["kind"]].load().start(start)
    return tracker


def attach_tracker(kind: str, spec: Mapping[str, Any]) -> Tracker:
    """Return the tracker of a run that was started in another process; nothing is contacted yet."""
    tracker: Tracker = TRACKERS[kind].load().attach(spec)
    return tracker


def check_tracking(options: Mapping[str, Any], storage_path: str) -> str:
    """Check whether a run with these options could start; return words for a report.

    Raises:
        TrackingError: as :func:`start_tracking`.
    """
    report: str = TRACKERS[options["kind"]].load().check(options, storage_path)
    return report

"""Starts trackers of the kind that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from raymem.recipe.axes import TRACKERS
from raymem.tracking.guard import GuardedTracker, failures_said
from raymem.tracking.tracker import RunStart, Tracker


def start_tracking(start: RunStart) -> Tracker:
    """Start the tracker that a recipe asks for.

    Raises:
        TrackingError: it cannot be used as the recipe says.
    """
    kind = start.recipe["tracking"]["kind"]
    with failures_said(kind):
        tracker: Tracker = TRACKERS[kind].load().start(start)
    never_raises = getattr(tracker, "never_raises", False)
    return tracker if never_raises else cast(Tracker, GuardedTracker(tracker, kind))


def check_tracking(options: Mapping[str, Any], storage_path: str) -> str:
    """Check whether a run with these options could start; return words for a report.

    Raises:
        TrackingError: as :func:`start_tracking`.
    """
    with failures_said(options["kind"]):
        report: str = TRACKERS[options["kind"]].load().check(options, storage_path)
    return report

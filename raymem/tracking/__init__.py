"""Records runs; the only room that imports mlflow (and only once it is needed)."""

from raymem.tracking.kinds import check_tracking, start_tracking
from raymem.tracking.tracker import DatasetFacts, NullTracker, RunStart, Tracker, TrackingResult

__all__ = [
    "DatasetFacts",
    "NullTracker",
    "RunStart",
    "Tracker",
    "TrackingResult",
    "check_tracking",
    "start_tracking",
]

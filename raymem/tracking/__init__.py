"""MLflow runs, metrics, artifacts and registry; the only room that imports mlflow (and only once it is needed)."""

from raymem.tracking.sink import MlflowSink, NullSink, TrackingSink, TrackingSummary, sink_from
from raymem.tracking.start import check_tracking, start_tracking

__all__ = ["MlflowSink", "NullSink", "TrackingSink", "TrackingSummary", "check_tracking", "sink_from", "start_tracking"]

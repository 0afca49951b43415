"""Holds trackers to what :class:`raymem.tracking.Tracker` promises: once started they cost no run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raymem.errors import RaymemError, TrackingError
from raymem.tracking.tracker import Status, Summary, Tracker, TrackingResult

log = logging.getLogger(__name__)


class GuardedTracker:
    """A tracker whose first failure is said at once, and at the end of the run.

    Args:
        kind: as recipes write it.
    """

    def __init__(self, tracker: Tracker, kind: str) -> None:
        self._tracker, self._kind = tracker, kind
        self._problem: str | None = None

    @property
    def run_id(self) -> str | None:
        return self._tracker.run_id

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            self._tracker.log(rows)
        except Exception as error:  # others' code may raise anything
            self._failed(error)

    def finish(
        self, status: Status, artifacts: Mapping[str, str | Path] | None = None, *, model: str | None = None
    ) -> TrackingResult:
        try:
            result = self._tracker.finish(status, artifacts, model=model)
        except Exception as error:  # others' code may raise anything
            self._failed(error)
        else:
            if self._problem is None or result.problem is not None:
                return result
        return Summary(self.run_id, self._problem)

    def _failed(self, error: Exception) -> None:
        if self._problem is None:
            self._problem = (
                f"tracking: {self._kind} failed: {type(error).__name__}: {error}; the run goes on without it"
            )
            log.warning("%s", self._problem)


@contextlib.contextmanager
def failures_said(kind: str) -> Iterator[None]:
    """Turn what a tracker raises before a run into an error of the user's."""
    try:
        yield
    except RaymemError:
        raise
    except Exception as error:  # others' code may raise anything
        raise TrackingError(
            f"tracking: {kind} cannot be used: {type(error).__name__}: {error}; mend it, or set tracking: none"
        ) from error

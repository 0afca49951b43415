"""One run in several tracking systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from raymem.tracking.kinds import check_tracking, start_tracking
from raymem.tracking.tracker import RunStart, Status, Summary, Tracker

_BETWEEN = ","


class SeveralTrackers:
    """Trackers that are told the same.

    Its id holds theirs, in order and with a comma between; one without an id leaves its place empty.
    """

    never_raises = True

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    @property
    def run_id(self) -> str | None:
        """See the class."""
        ids = [tracker.run_id or "" for tracker in self._trackers]
        return _BETWEEN.join(ids) if any(ids) else None

    @classmethod
    def start(cls, start: RunStart) -> Self:
        """Start one after the other; if one cannot be used, those before it end as FAILED. Raises TrackingError."""
        each = start.recipe["tracking"]["trackers"]
        parents = start.parent_run_id.split(_BETWEEN) if start.parent_run_id else [""] * len(each)
        trackers: list[Tracker] = []
        try:
            for options, parent in zip(each, parents, strict=True):
                recipe = {**start.recipe, "tracking": options}
                trackers.append(start_tracking(replace(start, recipe=recipe, parent_run_id=parent or None)))
        except BaseException:
            for tracker in trackers:
                tracker.finish("FAILED")
            raise
        return cls(trackers)

    @classmethod
    def check(cls, options: Mapping[str, Any], storage_path: str) -> str:
        """Check each. Raises TrackingError."""
        return "; ".join(f"{one['kind']}: {check_tracking(one, storage_path)}" for one in options["trackers"])

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log to each."""
        for tracker in self._trackers:
            tracker.log(rows)

    def finish(
        self, status: Status, artifacts: Mapping[str, str | Path] | None = None, *, model: str | None = None
    ) -> Summary:
        """Finish each."""
        run_id = self.run_id
        results = [tracker.finish(status, artifacts, model=model) for tracker in self._trackers]
        problems = [result.problem for result in results if result.problem]
        hints = [result.hint for result in results if result.hint]
        return Summary(
            run_id,
            "; ".join(problems) or None,
            "\n".join(hints) or None,
            [line for result in results for line in result.summary_lines()],
        )

"""The protocol of a tracking system, and the one that records nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class DatasetFacts:
    """One source of a run's data, as it was prepared."""

    name: str
    context: Literal["training", "evaluation"]
    digest: str
    """Changes whenever a token of the rows does."""
    source: str
    """Path, URI or id that the recipe names."""
    sequence_length: int
    columns: Mapping[str, str]
    """Column of the prepared rows -> its dtype."""
    figures: Mapping[str, Any]
    """Counts of rows, examples and tokens, and in words the format."""


@dataclass(frozen=True)
class RunStart:
    """Everything that a tracker may record when a run starts."""

    recipe: Mapping[str, Any]
    """As plain JSON values; ``recipe["tracking"]`` are the tracker's own options."""
    storage_path: str
    resume: bool
    """Training continues from a checkpoint, so the tracked run does too. A run that starts afresh under an old name
    gets a new one, because its steps would count as already logged."""
    device: str = "cpu"
    parent_run_id: str | None = None
    """The tracked run of the sweep that this run is a trial of."""
    group: str | None = None
    """Name of the pipeline that this run is a stage of."""
    point: Mapping[str, Any] = field(default_factory=dict)
    """What the sweep of a trial has chosen: path in the recipe -> value."""
    tags: Mapping[str, str] = field(default_factory=dict)
    source: Path | None = None
    """The recipe's file, if it is known."""
    datasets: Sequence[DatasetFacts] = ()
    """What the run trains and is evaluated on, if that is known."""


class TrackingResult(Protocol):
    """How the tracking of a run ended, for the last lines of a command."""

    @property
    def run_id(self) -> str | None:
        """Id of the run in the tracking system."""

    @property
    def problem(self) -> str | None:
        """One sentence if anything is missing there, else None."""

    @property
    def hint(self) -> str | None:
        """A command that shows the run, if there is one."""

    def summary_lines(self) -> list[str]:
        """Return lines about what was recorded, and where."""


class Tracker(Protocol):
    """One run of one tracking system.

    It lives in the driver, with Ray workers as without. Once started, it never raises and never blocks for long,
    whatever becomes of its server.
    """

    @classmethod
    def start(cls, start: RunStart) -> Self:
        """Create the tracked run, or continue it; everything that can fail for the user's sake fails here.

        Raises:
            TrackingError: the system cannot be used as the recipe says.
        """

    @classmethod
    def check(cls, options: Mapping[str, Any], storage_path: str) -> str:
        """Ask whether a run could start; returns words for a report. Nothing is created.

        Raises:
            TrackingError: as :meth:`start`.
        """

    @property
    def run_id(self) -> str | None:
        """Id of the run in the tracking system."""

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows ``{"step": 12.0, "loss": ..}``; values that are no numbers are left out.

        A step that the run already has is never logged again, so that replays after a crash are harmless, and so is
        passing a whole history once more at the end (which mends what an outage swallowed).
        """

    def finish(
        self, status: Status, artifacts: Mapping[str, str | Path] | None = None, *, model: str | None = None
    ) -> TrackingResult:
        """Send what is left and end the run.

        Args:
            artifacts: name -> local directory to upload.
            model: the artifact that is the trained model or adapter; a tracker that has a registry may register it.
        """


@dataclass(frozen=True)
class Summary:
    """A plain :class:`TrackingResult`; without arguments, nothing was recorded."""

    run_id: str | None = None
    problem: str | None = None
    hint: str | None = None
    lines: Sequence[str] = ()

    def summary_lines(self) -> list[str]:
        """Return the lines."""
        return list(self.lines)


class NullTracker:
    """``tracking: none``."""

    never_raises = True
    run_id: str | None = None

    @classmethod
    def start(cls, start: RunStart) -> Self:
        """See :class:`Tracker`, also below."""
        return cls()

    @classmethod
    def check(cls, options: Mapping[str, Any], storage_path: str) -> str:
        return "not wanted by this recipe"

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def finish(
        self, status: Status, artifacts: Mapping[str, str | Path] | None = None, *, model: str | None = None
    ) -> Summary:
        return Summary()

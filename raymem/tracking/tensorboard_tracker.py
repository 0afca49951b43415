"""Runs as TensorBoard event files. What an earlier session has written is read back, so that no step is there twice."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from raymem.errors import TrackingError
from raymem.recipe.yaml_text import write
from raymem.storage.errors import explain
from raymem.storage.storage import Storage
from raymem.tracking.library import library
from raymem.tracking.steps import NewSteps
from raymem.tracking.tracker import RunStart, Status, Summary

FOLDER = "tensorboard"
"""The directory of a storage with the events of all runs, where a recipe names no other."""
_EVENTS = "events.out.tfevents.*"


class TensorBoardTracker:
    """The event files of one run.

    Args:
        directory: of all runs.
        name: of this run's folder there.
    """

    run_id: str | None

    def __init__(self, directory: Path, name: str, *, resume: bool) -> None:
        from tensorboardX import SummaryWriter

        self._directory = directory
        self.run_id = name
        folder = directory / name
        has_old = any(folder.glob(_EVENTS))
        self._steps = NewSteps(_highest_steps(folder) if resume else None)
        self._writer: Any = SummaryWriter(
            str(folder),
            # What runs of this name have left that are not continued, TensorBoard drops at this mark.
            purge_step=0 if has_old and not resume else None,
            # By default two sessions that begin in one second have the same file, which the second one empties.
            filename_suffix=f".{time.time_ns()}",
        )

    @classmethod
    def start(cls, start: RunStart) -> Self:
        """See :class:`raymem.tracking.tracker.Tracker`.

        Raises:
            TrackingError: the directory is none that can be written, or tensorboardX is missing.
        """
        directory = _directory(start.recipe["tracking"]["directory"], start.storage_path)
        library("tensorboardX", "tensorboard")
        try:
            tracker = cls(directory, start.recipe["name"], resume=start.resume)
            if not start.resume:
                tracker._writer.add_text("recipe", "```yaml\n" + write(dict(start.recipe)) + "```", 0)
            tracker._writer.flush()
        except OSError as error:
            cure = "mend that, or set tracking.directory"
            problem = explain(error, "write", str(directory), where="tracking.directory", cure=cure)
            raise TrackingError(str(problem)) from error
        return tracker

    @classmethod
    def check(cls, options: Mapping[str, Any], storage_path: str) -> str:
        """Say where events will be; nothing is created. Raises TrackingError."""
        directory = _directory(options["directory"], storage_path)
        library("tensorboardX", "tensorboard")
        nearest = next(path for path in (directory, *directory.parents) if path.exists())
        if not os.access(nearest, os.W_OK) or not nearest.is_dir():
            raise TrackingError(
                f"tracking.directory: {nearest} cannot be written; mend that, or set tracking.directory"
            )
        return f"events in {directory}"

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows, and have them on the disk."""
        for step, numbers in self._steps.of(rows):
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(
        self, status: Status, artifacts: Mapping[str, str | Path] | None = None, *, model: str | None = None
    ) -> Summary:
        """Close the files. Artifacts stay where they are: TensorBoard keeps none."""
        self._writer.close()
        lines = [f"TensorBoard run {self.run_id} in {self._directory}"]
        return Summary(self.run_id, lines=lines, hint=f"look at the curves: tensorboard --logdir {self._directory}")


def _directory(directory: str | None, storage_path: str) -> Path:
    """Return the directory of all runs. Raises TrackingError."""
    if directory is not None:
        if "://" in directory:
            raise TrackingError(
                f"tracking.directory: {directory} is no directory of this machine, and event files grow step by step, "
                "which object stores do not allow; give a local or mounted one"
            )
        return Path(directory)
    storage = Storage.open(storage_path)
    if not storage.is_local:
        raise TrackingError(
            f"tracking.directory is not set, and event files grow step by step, which storage.path {storage_path} does "
            "not allow; set tracking.directory to a directory of the driver's machine"
        )
    return Path(storage.join(FOLDER))


def _highest_steps(folder: Path) -> dict[str, int]:
    """Return the highest step of each metric in a run's files."""
    highest: dict[str, int] = {}
    # The names of the files begin with the time at which they were begun.
    for path in sorted(folder.glob(_EVENTS)):
        for event in _events(path):
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                highest = {name: step for name, step in highest.items() if step < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    highest[value.tag] = max(event.step, highest.get(value.tag, -1))
    return highest


def _events(path: Path) -> Iterator[Any]:
    """Read the events of a file: each is framed by its length (8 bytes), that one's checksum (4) and its own (4)."""
    from tensorboardX.proto.event_pb2 import Event

    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            length = int.from_bytes(head[:8], "little")
            data = file.read(length + 4)
            if len(data) < length + 4:  # a kill has cut it
                return
            event = Event()
            event.ParseFromString(data[:length])
            yield event

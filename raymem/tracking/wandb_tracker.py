"""Runs in Weights & Biases, which sends in a process of its own: training never waits for its server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from raymem.errors import StorageError, TrackingError
from raymem.storage.storage import Storage
from raymem.tracking.library import library
from raymem.tracking.steps import NewSteps
from raymem.tracking.tracker import RunStart, Status, Summary

RECORD = "wandb.json"
"""The file of a run's directory with its ``id`` there, and for ``wandb sync`` the first ``step`` that is not logged."""
_START_S, _FINISH_S = 30, 120
_EXIT_CODES: dict[Status, int] = {"FINISHED": 0, "FAILED": 1, "KILLED": 255}
_CURE = "start or correct it (WANDB_BASE_URL), set tracking.mode: offline, or tracking: none"


class WandbTracker:
    """One run.

    Args:
        run: as ``wandb.init`` returned it.
        storage: of the run, for its record.
        next_step: steps below it are logged already.
    """

    def __init__(self, run: Any, storage: Storage, next_step: int, *, log_model: bool) -> None:
        self._run, self._storage, self._log_model = run, storage, log_model
        self._steps = NewSteps(below=next_step)

    @property
    def run_id(self) -> str | None:
        """Id of the run, with which it is continued."""
        return str(self._run.id)

    @classmethod
    def start(cls, start: RunStart) -> Self:
        """See :class:`raymem.tracking.tracker.Tracker`.

        Raises:
            TrackingError: wandb is missing, there is no key, or the server does not answer or refuses.
        """
        options = start.recipe["tracking"]
        wandb = _usable(options)
        storage = Storage.open(start.storage_path)
        run_storage = storage.child(start.recipe["name"])
        record = _record(run_storage) if start.resume else None
        run_id = uuid.uuid4().hex[:8] if record is None else record["id"]
        is_trial = start.parent_run_id is not None
        try:
            run = wandb.init(
                project=options["project"], entity=options["entity"], mode=_mode(options), id=run_id,
                resume=None if record is None else "allow", name=start.recipe["name"], config=dict(start.recipe),
                tags=[f"{key}: {value}"[:64] for key, value in start.tags.items()],
                group=start.parent_run_id or start.group, job_type="trial" if is_trial else None,
                dir=storage.path if storage.is_local else None, reinit="create_new",
                settings=wandb.Settings(
                    console="off", silent=True, disable_code=True, init_timeout=_START_S, finish_timeout=_FINISH_S,
                    finish_timeout_raises=True, x_disable_meta=True,
                ),
            )  # fmt: skip
        except Exception as error:  # its own errors have no base but this
            raise TrackingError(f"tracking: wandb does not start: {' '.join(str(error).split())}; {_CURE}") from error
        next_step = run.starting_step  # as the server has it
        if run.offline and record is not None:
            next_step = record["step"]
        run_storage.write_record(RECORD, {"id": run_id, "step": next_step})
        return cls(run, run_storage, next_step, log_model=options["log_model"])

    @classmethod
    def check(cls, options: Mapping[str, Any], storage_path: str) -> str:
        """Say whether there is a library and a key; nobody is asked. Raises TrackingError."""
        _usable(options)
        return f"project {options['project']}, {_mode(options)}"

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand rows to wandb's own process."""
        step = None
        for step, numbers in self._steps.of(rows):
            self._run.log(numbers, step=step)
        if step is not None and self._run.offline:
            self._storage.write_record(RECORD, {"id": self.run_id, "step": step + 1})

    def finish(
        self, status: Status, artifacts: Mapping[str, str | Path] | None = None, *, model: str | None = None
    ) -> Summary:
        """Send what is left, for two minutes at most, and end the run."""
        if self._log_model and model is not None and artifacts is not None:
            self._run.log_artifact(str(artifacts[model]), name=f"{self._run.name}-{model}", type="model")
        self._run.finish(exit_code=_EXIT_CODES[status])
        folder = Path(self._run.dir).parent
        if self._run.offline:
            lines = [f"W&B run {self.run_id} in {folder}"]
            sessions = folder.with_name(f"offline-run-*-{self.run_id}")
            return Summary(self.run_id, lines=lines, hint=f"upload it: wandb sync {sessions}")
        return Summary(self.run_id, lines=[f"W&B run {self.run_id} at {self._run.url}"])


def _usable(options: Mapping[str, Any]) -> Any:
    """Return the library, once it can be used with these options. Raises TrackingError."""
    wandb = library("wandb", "wandb")
    if _mode(options) == "online" and not wandb.login(prompt=False, verify=False):
        raise TrackingError(
            "tracking: wandb has no key here; set WANDB_API_KEY or run `wandb login` where the driver runs, or set "
            "tracking.mode: offline"
        )
    return wandb


def _mode(options: Mapping[str, Any]) -> str:
    return str(options["mode"] or os.environ.get("WANDB_MODE") or "online")


def _record(run: Storage) -> dict[str, Any] | None:
    """Return what an earlier session wrote, if there was one with this tracker."""
    try:
        return run.read_record(RECORD, {"id": (str,), "step": (int,)}) if run.exists(RECORD) else None
    except StorageError as error:
        raise TrackingError(f"tracking: {error}; delete that file to begin a new run there") from error

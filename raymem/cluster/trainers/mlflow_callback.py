"""Tracks anybody's Ray Train trainer in MLflow, from the process that owns the run: Ray Train's controller."""

from __future__ import annotations

import json
import logging
import posixpath
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pyarrow import fs

from raymem.cluster.train.callbacks import reason_of
from raymem.private_apis import ControllerCallback, ReportCallback, WorkerGroupCallback
from raymem.tracking.mlflow.late_run import LateRun, checked_uri, facts_of, numbers_of, whole
from raymem.tracking.mlflow.run import accepted_name, provenance
from raymem.tracking.mlflow.spool import Spool
from raymem.tracking.tracker import Status

_log = logging.getLogger("raymem.tracking")

_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""The file in which Ray Train keeps the checkpoints of a run, with their metrics."""
FOLDER = "mlflow"
"""The directory below a run's own where Ray Train keeps it, with what MLflow has not got yet."""


class MLflowCallback(ControllerCallback, WorkerGroupCallback, ReportCallback):  # type: ignore[misc]
    """Records a ``TorchTrainer`` (or any other trainer of Ray Train) as one MLflow run.

    ::

        RunConfig(name="mine", storage_path="/shared", callbacks=[MLflowCallback(experiment="mine")])

    The run holds the numbers of each ``ray.train.report``, ``train_loop_config`` and scaling as parameters, the path of
    the newest checkpoint as the tag ``ray.checkpoint``, and ends as FINISHED, FAILED or KILLED (Ctrl-C). Trainers of
    the same ``RunConfig(name, storage_path)`` go on with the same run, also after the driver was killed, and each step
    of a metric is there once. While the server is away, training goes on; metrics wait in ``<run>/mlflow`` on
    the trainer's storage, and are sent later, at the latest by the same trainer when it is run again.

    ``ray.train.UserCallback`` is told of reports and exceptions alone, so this is one of Ray's other callbacks, which
    also learn how a run begins and ends; ``RunConfig(callbacks=...)`` takes both.

    Args:
        experiment: made if there is none of that name.
        tracking_uri: by default ``MLFLOW_TRACKING_URI``, as it is where this object is made. User and password or token
            are never part of it: they belong into the environment of the cluster.
        step: the metric that is the step. Without it in any report, reports are counted, and a run that goes on after a
            failure goes on counting at its last checkpoint.
        ranks: ``first`` logs what rank 0 reports; ``all`` the others' too, as ``loss/rank_1``. (Where a node is being
            taken away, Ray passes on what the ranks that stay have reported: then it is the first one of these.)
        tags: of the MLflow run, for example ``{"mlflow.parentRunId": ...}``.

    Raises:
        TrackingError: the address is none, or its server does not answer or refuses.
        ValueError: ``ranks`` is neither.
    """

    def __init__(
        self, experiment: str = "ray-train", tracking_uri: str | None = None, *, step: str = "step",
        ranks: Literal["first", "all"] = "first", tags: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        if ranks not in ("first", "all"):
            raise ValueError(f"ranks={ranks!r} is neither 'first' nor 'all'")
        self._uri = checked_uri(tracking_uri)
        self._experiment, self._step, self._ranks = experiment, accepted_name(step), ranks
        program = Path(sys.argv[0])
        self._tags = provenance(program if program.is_file() else None)
        self._tags |= {str(name): str(value) for name, value in (tags or {}).items()}
        self._run: LateRun | None = None
        self._counted = self._counted_at_checkpoint = 0
        self._last_step: int | None = None
        self._restarts = 0

    def after_controller_start(self, train_run_context: Any) -> None:
        """Create the run or go on with it, and log metrics of checkpoints that a killed controller did not come to."""
        self._safely(lambda: self._start(train_run_context))

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Count again from the last checkpoint, from which the workers go on."""
        self._counted = self._counted_at_checkpoint

    def after_report(self, training_report: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Log what the ranks reported."""
        if self._run is not None:
            run, checkpoint = self._run, training_report.checkpoint
            self._safely(lambda: self._log(run, metrics, None if checkpoint is None else checkpoint.path))

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Note why a group of workers is started again, or failed for good."""
        if type(current_state).__name__ == "AbortedState":  # Ray before 2.60 has no hook for it
            self._finish("KILLED")
        error = getattr(current_state, "training_failed_error", None)
        if error is None or self._run is None:
            return
        run = self._run
        self._restarts += not current_state.is_terminal()
        tags = {"ray.restarts": str(self._restarts)}
        self._safely(lambda: run.log([], {**tags, "ray.last_failure": reason_of(error)}))

    def after_controller_finish(self, result: Any) -> None:
        """End the run."""
        self._finish("FINISHED" if result.error is None else "FAILED")

    def before_controller_abort(self) -> None:
        """End the run, which somebody has interrupted."""
        self._finish("KILLED")

    def _safely(self, action: Callable[[], None]) -> None:
        """Do something of which an error is only said: of a callback, it would end the training."""
        try:
            action()
        except Exception as error:  # whatever people report, and whatever their storage raises
            _log.warning("tracking fails, training goes on: %s: %s", type(error).__name__, error)

    def _start(self, context: Any) -> None:
        config, scaling = context.run_config, context.scaling_config
        storage = config.storage_context
        plain = {
            "num_workers": scaling.num_workers, "use_gpu": scaling.use_gpu,
            "resources_per_worker": scaling.resources_per_worker, "accelerator_type": scaling.accelerator_type,
        }  # fmt: skip
        note = "a run of Ray Train, tracked by raymem.ray.MLflowCallback"
        facts = facts_of(self._experiment, config.name, context.train_loop_config, plain, self._tags, note)
        spool = Spool(storage.storage_filesystem, posixpath.join(storage.experiment_fs_path, FOLDER))
        self._run = LateRun(self._uri, config.storage_path, facts, spool)
        self._counted = self._counted_at_checkpoint = self._run.noted("reports", 0)
        self._run.log(self._committed(storage))

    def _committed(self, storage: Any) -> list[dict[str, float]]:
        """Return the rows of checkpoints: a controller may be killed after it has committed one, before it logs it."""
        path = posixpath.join(storage.experiment_fs_path, _SNAPSHOT)
        if storage.storage_filesystem.get_file_info(path).type == fs.FileType.NotFound:
            return []
        with storage.storage_filesystem.open_input_stream(path) as stream:
            results = json.loads(stream.read()).get("checkpoint_results", [])
        rows = []
        for result in results:
            numbers = numbers_of(result["metrics"])
            if (step := whole(numbers.pop(self._step, None))) is not None:
                rows.append({**numbers, "step": float(step)})
        return sorted(rows, key=lambda row: row["step"])

    def _log(self, run: LateRun, metrics: Sequence[Mapping[str, Any]], checkpoint: str | None) -> None:
        rows = self._rows(metrics)
        if checkpoint is None:
            run.log(rows)
            return
        self._counted_at_checkpoint = self._counted
        run.note("reports", self._counted)
        run.log(rows, {"ray.checkpoint": checkpoint})

    def _rows(self, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        self._counted += 1
        first = metrics[0]
        rows = first.get("rows")  # of raymem's own worker function or reporter: several steps at once
        if isinstance(rows, list) and all(isinstance(row, Mapping) and "step" in row for row in rows):
            return [numbers_of(row) for row in rows]
        numbers = numbers_of(first)
        step = whole(numbers.pop(self._step, None))
        if step is None:
            step = self._counted if self._last_step is None else self._last_step
        else:
            self._last_step = step
        if self._ranks == "all":
            for rank, others in enumerate(metrics[1:], start=1):
                of_rank = numbers_of(others)
                of_rank.pop(self._step, None)
                numbers |= {f"{name}/rank_{rank}": value for name, value in of_rank.items()}
        return [{**numbers, "step": float(step)}]

    def _finish(self, status: Status) -> None:
        if self._run is not None:
            self._run.finish(status)
            self._run = None

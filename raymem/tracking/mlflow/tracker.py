"""Runs in MLflow. The tracker never raises and never blocks for long while training is under way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from raymem.storage.identity import check_id, read_id
from raymem.tracking.mlflow.client import brief, connect, limits
from raymem.tracking.mlflow.models import is_adapter, log_adapter, register
from raymem.tracking.mlflow.run import accepted_name, check_server, start_run
from raymem.tracking.mlflow.system import SystemMetrics
from raymem.tracking.mlflow.uri import database_file
from raymem.tracking.tracker import RunStart, Status

_log = logging.getLogger("raymem.tracking")

CALL_TIMEOUT_S = 5
RETRY_AFTER_S = 30.0
MAX_WAITING = 50_000
_METRICS_PER_BATCH = 1000
_BYTES = "_bytes"


@dataclass(frozen=True)
class MlflowResult:
    """How the tracking of a run stands."""

    uri: str
    run_id: str | None
    logged: int = 0
    """Metric values that this tracker sent."""
    waiting: int = 0
    """Metric values that are still to be sent."""
    dropped: int = 0
    """Metric values that were given up because too many were waiting."""
    failures: int = 0
    last_error: str | None = None
    model_version: str | None = None
    """``name/version`` of the registered model."""
    missing: tuple[str, ...] = ()
    """Artifacts (and ``registration``) that were to be there at the end and are not."""

    @property
    def problem(self) -> str | None:
        """One sentence if anything is missing on the server, else None."""
        if not self.failures:
            return None
        lost = self.waiting + self.dropped
        missing = f"{lost} metric values are missing there" if lost else "all metric values arrived later"
        if self.missing:
            missing += f"; {' and '.join(self.missing)} did not arrive: run the same command again to repeat that"
        return f"tracking at {self.uri} failed {self.failures} times ({self.last_error}); {missing}"

    @property
    def hint(self) -> str | None:
        """How to look at runs that no server shows."""
        return (
            f"look at the curves: mlflow ui --backend-store-uri {self.uri}" if self.uri.startswith("sqlite") else None
        )

    def summary_lines(self) -> list[str]:
        """Return the run, and the registered model if there is one."""
        lines = [f"MLflow run {self.run_id} at {self.uri}"]
        return [*lines, f"registered as {self.model_version}"] if self.model_version else lines


def now_ms() -> int:
    """Return the time as MLflow has it: milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class _Value(NamedTuple):
    key: str
    value: float
    timestamp: int  # of its acceptance, so that a batch sent twice is stored once
    step: int


class MlflowTracker:
    """An existing MLflow run.

    Args:
        group_run_id: run of the pipeline that it is a stage of, which ends as its last stage does.
        register_as: registered model that gets the trained model as a new version, under ``alias``.
        system: sampled beside the metrics that come.
    """

    never_raises = True

    def __init__(
        self, tracking_uri: str, run_id: str, *, group_run_id: str | None = None, register_as: str | None = None,
        alias: str | None = None, system: SystemMetrics | None = None, retry_after_s: float = RETRY_AFTER_S,
    ) -> None:  # fmt: skip
        self.tracking_uri = tracking_uri
        self.run_id: str | None = run_id
        self._group_run_id = group_run_id
        self._register_as, self._alias = register_as, alias
        self._system = system
        self._retry_after_s = retry_after_s
        self._client: Any = None
        database = database_file(tracking_uri)
        self._storage = None if database is None else database.parent
        self._storage_id = None if self._storage is None else read_id(self._storage)
        self._next_attempt = 0.0
        self._waiting: list[_Value] = []
        # Highest step on the server per metric; None means that it must be asked first (start, or after a failure).
        self._steps: dict[str, int] | None = None
        self._logged = self._dropped = self._failures = 0
        self._last_error: str | None = None
        self._missing: tuple[str, ...] = ()
        self._model_version: str | None = None

    @classmethod
    def start(cls, start: RunStart) -> Self:
        """See :class:`raymem.tracking.tracker.Tracker`.

        Raises:
            TrackingError: the server is unreachable or refuses, its experiment is deleted or lies elsewhere, artifacts
                cannot be written, or ``tracking.alias`` is a name that MLflow reserves.
        """
        options = start.recipe["tracking"]
        opened = start_run(start)
        system = SystemMetrics() if options["system_metrics"] else None
        return cls(
            opened.uri, opened.run_id, group_run_id=opened.group_run_id, register_as=options["register_as"],
            alias=options["alias"], system=system,
        )  # fmt: skip

    @classmethod
    def check(cls, options: Mapping[str, Any], storage_path: str) -> str:
        """Ask the tracking server for one experiment. Files are not created. Raises TrackingError."""
        return check_server(options, storage_path)

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send one request per call; while the server is away at most one attempt per 30 s."""
        now = now_ms()
        timed = [(now, row) for row in rows]
        if self._system is not None and timed:
            timed.append((now, {"step": timed[-1][1]["step"], **self._system.sample()}))
        self.log_at(timed)

    def log_at(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Log rows as :meth:`log` does, each with the time, in ms since 1970, at which it came."""
        for now, row in rows:
            step = int(row["step"])
            for name, value in row.items():
                key = accepted_name(name)  # a metric of answers may be called data.eval[0]/regex:...
                if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    self._waiting.append(_Value(key, float(value), now, step))
                    if key.endswith(_BYTES):  # MLflow's pages show bytes as they are
                        gib = f"{key.removesuffix(_BYTES)}_gib"
                        self._waiting.append(_Value(gib, float(value) / (1 << 30), now, step))
        if (excess := len(self._waiting) - MAX_WAITING) > 0:
            del self._waiting[:excess]
            self._dropped += excess
        if self._waiting and time.monotonic() >= self._next_attempt:
            self._flush()

    def finish(
        self, status: Status, artifacts: Mapping[str, str | Path] | None = None, *, model: str | None = None
    ) -> MlflowResult:
        """Flush, upload, log and register the model and end the run.

        What this run has logged or registered already is not doubled. Models are tagged with the base model and its
        revision.
        """
        uploads = dict(artifacts or {})
        register_as = self._register_as if model is not None else None
        everything = (*uploads, *(["the registration"] if register_as else []))
        if not self._flush():  # an absent server is found out here, within seconds, and not once per upload
            self._missing = everything
            return self.result()

        def upload(client: Any) -> None:
            for name, directory in uploads.items():
                if not Path(directory).is_dir():  # mlflow would upload nothing, and call that a success
                    raise NotADirectoryError(f"no directory {directory} to upload as {name}")
                client.log_artifacts(self.run_id, str(directory), name)
            if model is not None:
                self._log_model(client, model, Path(uploads[model]))

        with limits(timeout_s=120, retries=2, uri=self.tracking_uri):
            self._missing = () if self._guarded(upload) else everything
        with limits(CALL_TIMEOUT_S, retries=1):
            self._guarded(lambda c: c.set_terminated(self.run_id, status))
            if self._group_run_id is not None:
                self._guarded(lambda c: c.set_terminated(self._group_run_id, status))
        return self.result()

    def result(self) -> MlflowResult:
        """Return counts so far."""
        return MlflowResult(
            uri=self.tracking_uri,
            run_id=self.run_id,
            logged=self._logged,
            waiting=len(self._waiting),
            dropped=self._dropped,
            failures=self._failures,
            last_error=self._last_error,
            model_version=self._model_version,
            missing=self._missing,
        )

    def _flush(self) -> bool:
        with limits(CALL_TIMEOUT_S, retries=0):
            if self._guarded(self._send):
                return True
        self._steps = None
        self._next_attempt = time.monotonic() + self._retry_after_s
        return False

    def _send(self, client: Any) -> None:
        from mlflow.entities import Metric

        if self._steps is None:
            # The latest value of a metric is the one of its highest step; data.metrics would hide the step.
            latest = client.get_run(self.run_id).data.to_proto().metrics
            self._steps = {metric.key: metric.step for metric in latest}
        fresh = []
        for value in self._waiting:
            if value.step > self._steps.get(value.key, -1):
                self._steps[value.key] = value.step
                fresh.append(Metric(*value))
        for start in range(0, len(fresh), _METRICS_PER_BATCH):
            batch = fresh[start : start + _METRICS_PER_BATCH]
            client.log_batch(self.run_id, metrics=batch)
            self._logged += len(batch)
        self._waiting.clear()

    def _log_model(self, client: Any, name: str, directory: Path) -> None:
        """Log an adapter as a model of the run, and register it, or the whole model that lies among the artifacts."""
        run_id = str(self.run_id)
        logged = log_adapter(client, run_id, directory) if is_adapter(directory) else None
        if self._register_as:
            source = f"runs:/{run_id}/{name}"
            self._model_version = register(client, run_id, self._register_as, logged or source, self._alias)

    def _guarded(self, action: Callable[[Any], Any]) -> bool:
        try:
            if self._storage is not None and self._storage_id is not None:
                check_id(self._storage, self._storage_id)  # sqlite would begin an empty file in another one
            if self._client is None:
                self._client = connect(self.tracking_uri)
            action(self._client)
        except Exception as error:  # whatever it is, it must not end a training run
            self._failures += 1
            self._last_error = brief(error)
            if self._failures == 1:
                _log.warning("tracking at %s fails, training goes on: %s", self.tracking_uri, self._last_error)
            return False
        return True

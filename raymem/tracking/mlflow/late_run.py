"""Runs in MLflow of training that is not raymem's: created when the server answers, however late that is."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from raymem.errors import TrackingError
from raymem.storage.uris import names_secret, secret_in
from raymem.tracking.mlflow.client import brief, connect, limits
from raymem.tracking.mlflow.run import (
    RunFacts,
    accepted_name,
    check_answers,
    flatten,
    log_properties,
    open_run,
)
from raymem.tracking.mlflow.spool import Spool, Timed
from raymem.tracking.mlflow.tracker import CALL_TIMEOUT_S, MAX_WAITING, RETRY_AFTER_S, MlflowTracker, now_ms
from raymem.tracking.mlflow.uri import Spelling, database_file, resolve_tracking
from raymem.tracking.tracker import Status

_log = logging.getLogger("raymem.tracking")

AS_ARGUMENTS = Spelling("tracking_uri", "experiment", "storage_path", "leave the callback out")
_HIDDEN = "(a secret by its name, not logged)"


def checked_uri(uri: str | None) -> str:
    """Return a tracking address as it is given, or ``MLFLOW_TRACKING_URI``, once its server has answered.

    Raises:
        TrackingError: there is none, it cannot be used or holds a password, or its server does not answer or refuses.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise TrackingError(
            "tracking_uri is not given, and MLFLOW_TRACKING_URI is not set; give an MLflow server (http://host:port), "
            "or sqlite:////absolute/path.db on a disk that the driver's node sees"
        )
    address = resolve_tracking(uri, "/", AS_ARGUMENTS)
    if database_file(address.uri) is None:
        check_answers(address)
    return address.uri


class LateRun:
    """One run, by the key in its spool; no method raises.

    Rows are written to the spool before they are sent, and leave it when the server has them. A step that the server
    has of a metric is not sent again.

    Args:
        uri: of the server.
        artifacts: directory or URI below which artifacts lie if ``uri`` is a database and the experiment a new one.
        facts: what a new run has from its beginning.
    """

    def __init__(self, uri: str, artifacts: str, facts: RunFacts, spool: Spool) -> None:
        self._address = resolve_tracking(uri, artifacts, AS_ARGUMENTS)
        self._facts, self._spool = facts, spool
        self._state: dict[str, Any] | None = None
        self._tracker: MlflowTracker | None = None
        self._client: Any = None
        self._tags: dict[str, str] = {}
        self._unspooled: list[Timed] = []
        self._next_attempt = 0.0
        self._failures = 0
        self._said: set[str] = set()

    @property
    def run_id(self) -> str | None:
        """Id of the run; None until the server has answered."""
        return None if self._tracker is None else self._tracker.run_id

    def noted(self, name: str, default: int) -> int:
        """Return a number that :meth:`note` wrote down, in this process or one before."""
        self._try(self._read_state, "its storage")
        return int((self._state or {}).get(name, default))

    def note(self, name: str, number: int) -> None:
        """Write down a number for a process that goes on with the run."""
        self._try(lambda: self._spool.note(self._read_state() | {name: number}), "its storage")

    def log(self, rows: Iterable[Mapping[str, Any]], tags: Mapping[str, str] | None = None) -> None:
        """Log rows of numbers, each with its ``step``; send what waits, at most one attempt per 30 s of an outage."""
        timed = [(now_ms(), row) for row in rows]
        self._tags.update(tags or {})
        if timed and not self._try(lambda: self._spool.add(timed), "its storage"):
            self._unspooled = [*self._unspooled, *timed][-MAX_WAITING:]
        if time.monotonic() >= self._next_attempt:
            self._send()

    def finish(self, status: Status) -> None:
        """Send what waits, and end the run."""
        if self._send() and self._tracker is not None:
            problem = self._tracker.finish(status).problem
        else:
            problem = f"tracking at {self._address.uri} failed {self._failures} times"
        if self._tracker is None or problem:
            _log.warning(
                "%s; the metrics that the server lacks are kept in %s: run the same trainer again to send them",
                problem, self._spool.folder,
            )  # fmt: skip

    def _send(self) -> bool:
        if self._try(self._deliver, "the server"):
            return True
        self._failures += 1
        self._tracker = None  # it holds what the spool holds too
        self._next_attempt = time.monotonic() + RETRY_AFTER_S
        return False

    def _deliver(self) -> None:
        if self._tracker is None:
            key = self._read_state()["key"]
            with limits(CALL_TIMEOUT_S, retries=0):
                self._client = connect(self._address.uri)
                run_id = open_run(self._client, self._address, self._facts, key, resume=True)
            self._tracker = MlflowTracker(self._address.uri, run_id)
        for rows in self._spool.batches():
            self._log_at(self._tracker, rows)
        self._log_at(self._tracker, self._unspooled)
        self._unspooled = []
        with limits(CALL_TIMEOUT_S, retries=0):
            log_properties(self._client, str(self.run_id), tags=self._tags)
        self._tags = {}

    def _read_state(self) -> dict[str, Any]:
        if self._state is None:
            self._state = self._spool.state()
        return self._state

    def _log_at(self, tracker: MlflowTracker, rows: Sequence[Timed]) -> None:
        """Log rows, or raise what the server said."""
        tracker.log_at(rows)
        if tracker.result().waiting:
            raise ConnectionError(tracker.result().last_error)

    def _try(self, action: Callable[[], object], what: str) -> bool:
        try:
            action()
        except Exception as error:  # whatever it is, it must not end a training run
            if what not in self._said:
                self._said.add(what)
                text = f"tracking at {self._address.uri}: {what} fails, training goes on: {brief(error)}"
                _log.warning("%s", text)
            return False
        return True


def facts_of(experiment: str, name: str, config: Any, scaling: Any, tags: Mapping[str, str], note: str) -> RunFacts:
    """Return what a run of somebody's trainer has from its beginning; values of secrets by their name are left out.

    Args:
        config: the trainer's ``train_loop_config``, whatever it holds.
        scaling: plain values of its ``ScalingConfig``.
    """
    params = dict(flatten(_without_secrets({"config": config or {}, "scaling": scaling})))
    return RunFacts(experiment, name, tags, params, note)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _HIDDEN if names_secret(str(key)) else _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value]
    return _HIDDEN if isinstance(value, str) and secret_in(value) else value


def numbers_of(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return what of reported metrics is a number, nested ones as ``outer/inner``, NumPy's and torch's scalars too, by
    names that MLflow takes.
    """
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            numbers |= numbers_of(value, f"{prefix}{key}/")
        elif _is_scalar(value):
            numbers[accepted_name(f"{prefix}{key}")] = float(value)
    return numbers


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, bool | str | bytes) and getattr(value, "ndim", 0) == 0 and hasattr(value, "__float__")


def whole(value: float | None) -> int | None:
    """Return a step that is a whole number, else None."""
    return int(value) if value is not None and math.isfinite(value) and value == int(value) else None

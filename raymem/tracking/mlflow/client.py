"""How raymem talks to mlflow: quietly, and with a limit on the time that any call may take."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raymem.storage.folders import make_directory, storage_above
from raymem.storage.permissions import open_lock, share
from raymem.tracking.mlflow.uri import database_file

_environment = threading.Lock()

# mlflow would otherwise report each import to its makers' server, print a link for each run that ends, and draw bars.
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def connect(uri: str) -> Any:
    """Return an ``MlflowClient``; for a new sqlite file this creates the tables (some seconds, once)."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    # It prints the traceback of every refusal of a database, also of those that are raised and said in a sentence.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    database = database_file(uri)
    if database is None:
        return MlflowClient(uri)
    with _alone(database), warnings.catch_warnings(action="ignore"):
        client = MlflowClient(uri)  # makes the tables; alembic warns about mlflow's own migrations
    if storage_above(database) is not None:
        share(database, writable=True)
    return client


@contextlib.contextmanager
def _alone(database: Path) -> Iterator[None]:
    """Let in one process at a time: mlflow's migrations fail when two drivers make the tables of a new file at once."""
    make_directory(database.parent)
    with open_lock(Path(f"{database}.lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def limits(timeout_s: int, retries: int, uri: str | None = None) -> Iterator[None]:
    """Bound the HTTP calls inside: mlflow's own default of 120 s and 7 growing waits would stall training.

    mlflow reads these from the environment at each call and has no argument for them.

    Args:
        uri: the tracking address, for calls by which mlflow makes a client of its own.
    """
    bounds = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries)}
    if uri is not None:
        bounds["MLFLOW_TRACKING_URI"] = uri
    with _environment:
        saved = {name: os.environ.get(name) for name in bounds}
        os.environ.update(bounds)
        try:
            yield
        finally:
            for name, value in saved.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def brief(error: BaseException) -> str:
    """Return one line of an mlflow error; its texts run to pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."

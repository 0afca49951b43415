"""Where a run is tracked: the recipe's server, the environment's, or sqlite under the storage path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from raymem.errors import TrackingError
from raymem.storage.storage import Storage

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class TrackingAddress:
    """A resolved tracking address."""

    uri: str
    artifact_location: str | None
    """Root of the artifacts of a new experiment; None where the server decides."""
    embedded: bool
    """True for the sqlite file under the storage path, which is made on first use."""


def resolve_tracking(uri: str | None, storage_path: str) -> TrackingAddress:
    """Resolve ``tracking.uri``; without one, ``MLFLOW_TRACKING_URI`` counts, then sqlite under the storage path.

    Nothing is contacted. Artifacts of a database address always lie under the storage path: mlflow's own default is
    ``./mlruns`` of whichever process comes first, which under Ray is a directory of a worker.

    Raises:
        TrackingError: no address and object storage, an unsupported or relative one, or a password in it.
    """
    where = "tracking.uri" if uri else "MLFLOW_TRACKING_URI"
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    storage = Storage.open(storage_path)
    artifacts = storage.join("mlartifacts").split("?")[0]
    if uri is None:
        if not storage.is_local:
            raise TrackingError(
                f"tracking.uri is not set, and storage.path {storage_path} is no directory that could hold an sqlite "
                "file; set tracking.uri to an MLflow server (http://host:port), or tracking: none"
            )
        return TrackingAddress(f"sqlite:///{storage.join('mlflow.db')}", artifacts, embedded=True)
    parts = urlsplit(uri)
    if parts.password:
        raise TrackingError(
            f"{where}: a password in the address would be stored with every checkpoint and run; take it out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for a database: run `mlflow server` before it)"
        )
    scheme = parts.scheme.split("+")[0]
    if scheme == "sqlite" and not parts.path.startswith("//"):
        raise TrackingError(
            f"{where}: {uri} is relative, which means another file in each process; write sqlite:////absolute/path.db"
        )
    if scheme in _DATABASES:
        return TrackingAddress(uri, artifacts, embedded=False)
    if scheme in ("http", "https") and parts.hostname:
        return TrackingAddress(uri.rstrip("/"), None, embedded=False)
    if uri == "databricks" or scheme == "databricks":
        return TrackingAddress(uri, None, embedded=False)
    raise TrackingError(
        f"{where}: {uri!r} is no address that can be used; give an MLflow server (http://host:port), "
        "sqlite:////absolute/path.db, or leave it out"
    )

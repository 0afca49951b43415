"""Where a run is tracked: the recipe's server, the environment's, or sqlite under the storage path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from raymem.errors import TrackingError
from raymem.storage.storage import Storage
from raymem.storage.uris import secret_in

ARTIFACTS = "mlartifacts"
"""The directory of a storage with the artifacts of tracked runs, where raymem decides."""
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class Spelling:
    """The words by which errors name settings, and what does without tracking: those of a recipe."""

    uri: str = "tracking.uri"
    experiment: str = "tracking.experiment"
    storage: str = "storage.path"
    without: str = "set tracking: none"


@dataclass(frozen=True)
class TrackingAddress:
    """A resolved tracking address."""

    uri: str
    artifact_location: str | None
    """Root of the artifacts of a new experiment; None where the server decides."""
    embedded: bool
    """True for the sqlite file under the storage path, which is made on first use."""
    spelling: Spelling = Spelling()


def resolve_tracking(uri: str | None, storage_path: str, spelling: Spelling = Spelling()) -> TrackingAddress:
    """Resolve ``tracking.uri``; without one, ``MLFLOW_TRACKING_URI`` counts, then sqlite under the storage path.

    Nothing is contacted. Artifacts of a database address always lie under the storage path: mlflow's own default is
    ``./mlruns`` of whichever process comes first, which under Ray is a directory of a worker.

    Raises:
        TrackingError: no address and object storage, an unsupported or relative one, or a password in it.
    """
    where = spelling.uri if uri else "MLFLOW_TRACKING_URI"
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    storage = Storage.open(storage_path)
    artifacts = storage.join(ARTIFACTS)
    # mlflow decodes plain paths too, and takes the options of an object store's URI for a part of the path.
    artifacts = (
        (Path(artifacts).as_uri() if _is_odd(artifacts) else artifacts)
        if storage.is_local
        else (artifacts.split("?")[0])
    )
    if uri is None:
        if not storage.is_local:
            raise TrackingError(
                f"{spelling.uri} is not set, and {spelling.storage} {storage_path} is no directory that could hold an "
                f"sqlite file; set {spelling.uri} to an MLflow server (http://host:port), or {spelling.without}"
            )
        return TrackingAddress(_sqlite_uri(storage.join("mlflow.db")), artifacts, embedded=True, spelling=spelling)
    parts = urlsplit(uri)
    if found := secret_in(uri):
        raise TrackingError(
            f"{where}: {found} in the address would be stored with every checkpoint and run; take it out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN (for a database: run "
            "`mlflow server` before it)"
        )
    scheme = parts.scheme.split("+")[0]
    if scheme == "sqlite" and not parts.path.startswith("//"):
        raise TrackingError(
            f"{where}: {uri} is relative, which means another file in each process; write sqlite:////absolute/path.db"
        )
    if scheme in _DATABASES:
        return TrackingAddress(uri, artifacts, embedded=False, spelling=spelling)
    if scheme in ("http", "https") and parts.hostname:
        return TrackingAddress(uri.rstrip("/"), None, embedded=False, spelling=spelling)
    if uri == "databricks" or scheme == "databricks":
        return TrackingAddress(uri, None, embedded=False, spelling=spelling)
    raise TrackingError(
        f"{where}: {uri!r} is no address that can be used; give an MLflow server (http://host:port), "
        "sqlite:////absolute/path.db, or leave it out"
    )


def database_file(uri: str) -> Path | None:
    """Return the file of an sqlite address; None for any other."""
    if not uri.startswith(("sqlite:", "sqlite+")):
        return None
    path = uri.split(":///", 1)[1]
    if _is_odd(path):
        from sqlalchemy import make_url

        path = make_url(uri).database or path
    return Path(path)


def _sqlite_uri(path: str) -> str:
    if not _is_odd(path):
        return f"sqlite:///{path}"
    from sqlalchemy import URL, make_url

    # With the driver's name, because mlflow takes all behind sqlite:/// for a path and makes its directory.
    uri = URL.create("sqlite+pysqlite", database=path).render_as_string(hide_password=False)
    if make_url(uri).database != path:  # before version 2.1
        raise TrackingError(
            f"storage.path {path!r} cannot be written as a database address by this version of sqlalchemy: choose a "
            f"path without %, ? and #, or install sqlalchemy>=2.1"
        )
    return uri


def _is_odd(path: str) -> bool:
    """Say whether a path holds a character that has a meaning of its own in a URI."""
    return not {"%", "?", "#"}.isdisjoint(path)

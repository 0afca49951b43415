"""Which address a run is tracked at."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest

from raymem.errors import TrackingError
from raymem.tracking.mlflow.uri import TrackingAddress, database_file, resolve_tracking

S3 = "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1"


def test_default_is_sqlite_under_the_storage_path() -> None:
    assert resolve_tracking(None, "/data/runs") == TrackingAddress(
        "sqlite:////data/runs/mlflow.db", "/data/runs/mlartifacts", embedded=True
    )


def test_what_a_uri_would_read_otherwise_is_written_so_that_it_does_not() -> None:
    for name in ("a%20b", "a?b", "a#b", "50%"):
        place = resolve_tracking(None, f"/data/{name}")
        assert database_file(place.uri) == Path(f"/data/{name}/mlflow.db")
        assert unquote(str(place.artifact_location)) == f"file:///data/{name}/mlartifacts"
        assert resolve_tracking("postgresql://u@h/db", f"/data/{name}").artifact_location == place.artifact_location
    assert database_file("sqlite:////x/y.db?timeout=5") == Path("/x/y.db")
    assert database_file("http://h:1") is None


def test_environment_counts_after_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000")
    assert resolve_tracking(None, "/data").uri == "http://env:5000"
    assert resolve_tracking("http://recipe:5000/", "/data").uri == "http://recipe:5000"


def test_artifact_location() -> None:
    assert resolve_tracking("http://h:1", "/data").artifact_location is None
    assert resolve_tracking("databricks", "/data").artifact_location is None
    assert resolve_tracking("sqlite:////x/y.db", "/data").artifact_location == "/data/mlartifacts"
    assert resolve_tracking("postgresql+psycopg://u@h/db", S3).artifact_location == "s3://bucket/runs/mlartifacts"


@pytest.mark.parametrize(
    ("uri", "storage", "words"),
    [
        (None, S3, r"tracking.uri is not set, .*; set tracking.uri to an MLflow server"),
        ("sqlite:///m.db", "/data", r"tracking.uri: sqlite:///m.db is relative, .* sqlite:////absolute/path.db"),
        ("./mlruns", "/data", r"tracking.uri: './mlruns' is no address that can be used; give an MLflow server"),
        ("file:///mlruns", "/data", r"is no address that can be used"),
        ("http:///x", "/data", r"is no address that can be used"),
    ],
)
def test_refused(uri: str | None, storage: str, words: str) -> None:
    with pytest.raises(TrackingError, match=words):
        resolve_tracking(uri, storage)


@pytest.mark.parametrize("uri", ["https://me:hunter2@host/mlflow", "postgresql://me:hunter2@host/db"])
def test_password_is_refused_and_not_repeated(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrackingError, match=r"^tracking.uri: .*MLFLOW_TRACKING_PASSWORD") as caught:
        resolve_tracking(uri, "/data")
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=r"^MLFLOW_TRACKING_URI: ") as caught:
        resolve_tracking(None, "/data")
    assert "hunter2" not in str(caught.value)

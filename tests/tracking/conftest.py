"""A storage whose mlflow database has its tables already, and no server in the environment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture
def storage(tmp_path: Path, template_db: Path) -> str:
    """A local storage path whose mlflow.db is ready."""
    root = tmp_path / "store"
    root.mkdir()
    shutil.copy(template_db, root / "mlflow.db")
    return str(root)


@pytest.fixture(autouse=True)
def _no_ambient_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

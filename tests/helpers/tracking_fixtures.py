"""An mlflow database with its tables already made (the migrations take seconds), and an mlflow server in a thread."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.helpers.tracking import Server

FIRST_USE = """
import json, logging, sys
logging.basicConfig(level=logging.INFO)
import raymem.tracking
assert "mlflow" not in sys.modules  # it is loaded when it is needed
tracker = raymem.tracking.start_tracking(raymem.tracking.RunStart(json.loads(sys.argv[2]), sys.argv[1], resume=False))
tracker.log([{"step": 1, "loss": 1.0}])
assert tracker.finish("FINISHED").problem is None
"""


@pytest.fixture(scope="session")
def first_use(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two drivers that start at once on one fresh storage; their database then serves all tests as a template."""
    from tests.helpers.tracking import recipe

    store = tmp_path_factory.mktemp("mlflow") / "new" / "store"
    cwd = tmp_path_factory.mktemp("cwd")
    command = [sys.executable, "-c", FIRST_USE, str(store), json.dumps(recipe(experiment="first"))]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    both = [subprocess.Popen(command, cwd=cwd, text=True, **pipes) for _ in range(2)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    return {
        "outputs": outputs,
        "codes": [process.returncode for process in both],
        "db": store / "mlflow.db",
        "cwd": cwd,
    }


@pytest.fixture(scope="session")
def template_db(first_use: dict[str, Any]) -> Path:
    """A database of the installed mlflow with its tables, and one foreign experiment."""
    path: Path = first_use["db"]
    return path


@pytest.fixture(scope="module")
def server(template_db: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.helpers.tracking import Server

    directory = tmp_path_factory.mktemp("server")
    shutil.copy(template_db, directory / "m.db")
    names = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{directory}/m.db",
        "_MLFLOW_SERVER_REGISTRY_STORE": f"sqlite:///{directory}/m.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(directory / "art"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        running = Server()
        yield running
        running.close()

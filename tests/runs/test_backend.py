"""Where work is done: in this process without Ray, or with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raymem.cluster import connection
from raymem.cluster.backend import RayBackend
from raymem.cluster.doctor import checks
from raymem.recipe.schema import ScalingSection
from raymem.runs.backend import LocalBackend, backend_of
from raymem.storage.storage import Storage
from raymem.training.dist_env import DistEnv
from tests.helpers.support import make_recipe


def test_a_run_in_this_process_loads_no_ray() -> None:
    program = (
        "import sys; sys.modules['bitsandbytes'] = None\n"  # PEFT would load the whole compiler
        "import raymem.runs.train, raymem.runs.evaluate, raymem.runs.loram.pipeline\n"
        "print(sorted({'ray', 'mlflow', 'optuna'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("num_workers", "kind"), [(0, LocalBackend), (1, RayBackend), ([1, 2], RayBackend)])
def test_scaling_decides(num_workers: Any, kind: type) -> None:
    assert type(backend_of(make_recipe({"scaling": {"num_workers": num_workers}}).scaling)) is kind


def test_this_process_does_one_thing_after_the_other(tmp_path: Path) -> None:
    backend, told = LocalBackend(), list[str]()
    backend.connect(Storage.open(str(tmp_path)), told.append)
    assert backend.map(lambda number: number + 1, [1, 2]) == [2, 3]
    assert backend.group(lambda config, dist_env, doing: (config["x"], dist_env), {"x": 5}) == (5, DistEnv())
    assert not told


def test_ray_is_connected_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(connection, "connect", asked.append)
    monkeypatch.setattr(checks, "check_storage_shared", asked.append)
    scaling, told = ScalingSection(num_workers=2), list[str]()
    backend = RayBackend(scaling)
    for _ in range(2):
        backend.connect(Storage.open(str(tmp_path)), told.append)
    assert (asked, told) == ([scaling, str(tmp_path)], ["starting Ray"])

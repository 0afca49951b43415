"""The local cluster that raymem starts for one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import make_recipe

NICENESS = """
import json, os, sys
import ray
from raymem.cluster.connection import connect
from raymem.training.recipe import Recipe

connect(Recipe.model_validate(json.loads(sys.argv[1])), driver_first=sys.argv[2] == "True")
print("niceness", ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("driver_first", "added"), [(False, 0), (True, 15)])
def test_workers_give_way_only_where_the_driver_has_work(
    driver_first: bool, added: int, llama: Path, tmp_path: Path
) -> None:
    recipe = make_recipe({"scaling": {"num_workers": 0}, "storage": {"path": str(tmp_path)}}, model=llama)
    command = [sys.executable, "-c", NICENESS, json.dumps(recipe.to_dict()), str(driver_first)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert f"niceness {added}\n" in done.stdout, done.stdout + done.stderr

"""A node that is taken back: its notice makes the group save every step, and another node goes on from the last one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.nodes import running_cluster
from tests.helpers.run_files import losses, result_bytes, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
NOTICE_S = 25.0


def test_a_run_loses_at_most_the_step_in_which_its_node_goes(llama: Path, examples: Path, tmp_path: Path) -> None:
    steps = {"steps": 3000, "global_batch": 4, "micro_batch": 2, "save_every": 3000}
    scaling = {"num_workers": 1, "resources_per_worker": {"CPU": 1, "slot": 1}}
    write_recipe(tmp_path / "drained.yaml", tmp_path, llama, examples, train=steps, scaling=scaling)
    write_recipe(tmp_path / "straight.yaml", tmp_path, llama, examples, train=steps)
    with running_cluster() as cluster:
        environment = {**os.environ, **cluster.environment, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
        run = subprocess.Popen(
            [sys.executable, "-m", "raymem", "train", str(tmp_path / "drained.yaml")],
            env={**environment, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert run.stdout is not None
        said: list[str] = []
        for line in run.stdout:
            said.append(line)
            if re.match(r"step \d", line):
                break
        (node,) = cluster.busy_nodes()
        assert cluster.drain(node, NOTICE_S)
        time.sleep(NOTICE_S)
        checkpoints = tmp_path / "runs" / "drained" / "checkpoints"
        assert list(checkpoints.glob("step_*/manifest.json")), "the notice made it save"
        cluster.kill(node)
        out, _ = run.communicate(timeout=600)
    out = "".join(said) + out
    assert run.returncode == 0, out
    first, again = (int(step) for step in re.findall(r"taking step (\d+), the first of this session", out))
    taken = max(int(step) for step in re.findall(r"^step (\d+)", out.partition("start again")[0], re.MULTILINE))
    assert first == 1 and again >= taken, "what was seen of it was saved"
    straight = [sys.executable, "-m", "raymem", "train", str(tmp_path / "straight.yaml")]
    subprocess.run(straight, check=True, capture_output=True, timeout=400)
    runs = tmp_path / "runs"
    assert losses(runs / "drained") == losses(runs / "straight")
    assert result_bytes(runs / "drained") == result_bytes(runs / "straight")

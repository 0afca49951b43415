"""``ray job submit ... jobs/finetune.py`` on a real head with token authentication."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.ray_processes import KillOnce, RayHead
from tests.helpers.run_files import losses, result_bytes
from tests.helpers.runs import ray_recipe, train_here
from tests.helpers.support import in_processes

pytestmark = pytest.mark.slow  # test_installed.py submits one to a head in the default tier

ROOT = Path(__file__).parents[3]


def submit(head: RayHead, recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ray's own tool, as a person types it; it follows the job and exits with its status."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--"]
    command += [sys.executable, "jobs/finetune.py", str(recipe), *arguments]
    return subprocess.run(command, cwd=ROOT, env=head.client_env(), capture_output=True, text=True, timeout=280)


def test_a_job_trains_and_a_worker_that_hangs_changes_nothing(
    ray_head: RayHead, llama: Path, examples: Path, tmp_path: Path
) -> None:
    """The worker is stopped at its first checkpoint, named and killed; the end is bit for bit that without Ray."""
    recipe, run = tmp_path / "job.yaml", tmp_path / "runs" / "job"
    wanted = ray_recipe(llama, examples, tmp_path / "runs", "job", scaling={"num_workers": 1, "hang_timeout": "8s"})
    recipe.write_text(yaml.safe_dump(wanted.to_dict()))
    killer = KillOnce(ray_head, run, signal.SIGSTOP)
    killer.start()

    done = submit(ray_head, recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 40/40" in done.stdout
    assert "trained 40 steps (resumed at " in done.stdout, "from a checkpoint"
    assert "Traceback" not in done.stdout
    assert ray_head.token_path.read_text() not in done.stdout + done.stderr
    assert f"process {killer.killed}) hangs: no progress for scaling.hang_timeout=8 s" in done.stdout
    assert "its process is stopped (SIGSTOP)" in done.stdout

    untouched = ray_recipe(llama, examples, tmp_path / "untouched", "job", scaling={"num_workers": 0})
    (expected,) = in_processes(train_here, 0, tmp_path / "meet", untouched)
    assert (losses(run), result_bytes(run)) == (expected, result_bytes(tmp_path / "untouched" / "job"))


def test_a_refused_recipe_fails_the_job_with_one_line(
    ray_head: RayHead, llama: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "job.yaml"
    recipe.write_text(yaml.safe_dump(ray_recipe(llama, examples, tmp_path / "runs", "job").to_dict()))
    refused = submit(ray_head, recipe, "--set", "adapter.rnak=3")
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "did you mean 'rank'" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout

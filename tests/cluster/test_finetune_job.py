"""``ray job submit ... jobs/finetune.py`` on a real head with token authentication."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray_processes import RayHead
from runs import ray_recipe

ROOT = Path(__file__).parents[2]


def submit(head: RayHead, recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ray's own tool, as a person types it; it follows the job and exits with its status."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--"]
    command += [sys.executable, "jobs/finetune.py", str(recipe), *arguments]
    return subprocess.run(command, cwd=ROOT, env=head.client_env(), capture_output=True, text=True, timeout=280)


def test_job_trains(ray_head: RayHead, llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "job.yaml"
    wanted = ray_recipe(llama, examples, tmp_path / "runs", "job", scaling={"num_workers": 1})
    recipe.write_text(yaml.safe_dump(wanted.to_dict()))

    done = submit(ray_head, recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 40/40" in done.stdout
    assert "trained 40 steps" in done.stdout
    assert "Traceback" not in done.stdout
    assert (tmp_path / "runs" / "job" / "adapter" / "adapter_model.safetensors").is_file()
    assert ray_head.token_path.read_text() not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_refused_recipe_fails_the_job_with_one_line(
    ray_head: RayHead, llama: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "job.yaml"
    recipe.write_text(yaml.safe_dump(ray_recipe(llama, examples, tmp_path / "runs", "job").to_dict()))
    refused = submit(ray_head, recipe, "--set", "adapter.rnak=3")
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "did you mean 'rank'" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout

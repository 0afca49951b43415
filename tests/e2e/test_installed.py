"""Jobs of an installed wheel, sent from a directory that holds nothing but what the recipe needs, to a real head."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymem.recipe.load import load_recipe
from tests.helpers.loram_runs import BASE
from tests.helpers.ray_processes import KillOnce, RayHead, running_head
from tests.helpers.run_files import losses, result_bytes
from tests.helpers.runs import train_here
from tests.helpers.support import in_processes, merged

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Installed:
    """An installation of the wheel, and a cluster whose nodes have it too."""

    head: RayHead
    packages: Path

    def run(self, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """A command of that installation, in a directory."""
        environment = {**self.head.client_env(), **search_path(self.packages)}
        del environment["RAY_ADDRESS"]  # a laptop knows the dashboard, not the cluster's own ports
        return subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
        )


def search_path(packages: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(packages)}  # before the checkout, which the interpreter may know as an editable package


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pip install raymem-*.whl`` puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True
    )
    if built.returncode != 0:
        pytest.skip(f"the wheel cannot be built here (no pip, or no hatchling to be had): {built.stderr[-500:]}")
    (wheel,) = folder.glob("raymem-*.whl")
    target = folder / "packages"
    subprocess.run([*pip, "install", "--no-deps", "--quiet", "--target", str(target), str(wheel)], check=True)
    return target


@pytest.fixture(scope="module")
def installed(packages: Path) -> Iterator[Installed]:
    with running_head(**search_path(packages)) as head:
        yield Installed(head, packages)


def write_recipe(folder: Path, model: Path, data: str, **sections: Any) -> Path:
    """my.yaml in a directory of its own; storage is elsewhere. Returns the storage path."""
    folder.mkdir()
    storage = folder.parent / "runs"
    plain = {
        "model": {"name": str(model)},
        "data": {"train": data, "sequence_length": 32},
        "adapter": {"rank": 4},
        "train": {"steps": 4, "global_batch": 4, "micro_batch": 2, "save_every": 2},
        "scaling": {"num_workers": 1, "resources_per_worker": {"CPU": 1}},
        "storage": {"path": str(storage)},
        "tracking": "none",
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(merged(plain, sections)))
    return storage


def test_a_recipe_alone_in_a_directory_and_a_worker_that_hangs(
    installed: Installed, tmp_path: Path, llama: Path, examples: Path
) -> None:
    """A Ray worker trains with the code of the wheel; stopped at its first checkpoint, it is named and killed.

    The end is bit for bit that without Ray.
    """
    project = tmp_path / "project"
    steps = {"steps": 40, "save_every": 4}
    storage = write_recipe(
        project, llama, str(examples / "train.jsonl"), train=steps, adapter={"dropout": 0.1},
        scaling={"hang_timeout": "8s"},
    )  # fmt: skip
    where = installed.run("-c", "import raymem; print(raymem.__file__)", folder=project)
    assert Path(where.stdout.strip()).is_relative_to(installed.packages), where.stdout
    killer = KillOnce(installed.head, storage / "my", signal.SIGSTOP)
    killer.start()
    done = installed.run("-m", "raymem", "submit", "my.yaml", folder=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 40/40" in done.stdout
    assert "trained 40 steps (resumed at " in done.stdout, "from a checkpoint"
    assert "Traceback" not in done.stdout + done.stderr
    assert installed.head.token_path.read_text() not in done.stdout + done.stderr
    assert f"process {killer.killed}) hangs: no progress for scaling.hang_timeout=8 s" in done.stdout
    assert "its process is stopped (SIGSTOP)" in done.stdout
    assert [path.name for path in project.iterdir()] == ["my.yaml"]

    untouched = load_recipe(project / "my.yaml", ["scaling.num_workers=0", f"storage.path={tmp_path / 'untouched'}"])
    (expected,) = in_processes(train_here, 0, tmp_path / "meet", untouched)
    assert (losses(storage / "my"), result_bytes(storage / "my")) == (
        expected, result_bytes(tmp_path / "untouched" / "my")
    )  # fmt: skip


@pytest.mark.slow
def test_options_of_the_command_and_ray_s_own_tool(
    installed: Installed, tmp_path: Path, llama: Path, examples: Path
) -> None:
    """--force trains above the budget; --fresh starts over; both tools run the same command."""
    project = tmp_path / "project"
    storage = write_recipe(project, llama, "train.jsonl", budget="100KiB", scaling={"num_workers": 0})
    shutil.copy(examples / "train.jsonl", project)
    refused = installed.run("-m", "raymem", "submit", "my.yaml", folder=project)
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "--force" in refused.stdout
    forced = installed.run("-m", "raymem", "submit", "my.yaml", "--", "--force", folder=project)
    assert forced.returncode == 0, forced.stdout + forced.stderr
    fresh = installed.run("-m", "raymem", "submit", "my.yaml", "--", "--force", "--fresh", folder=project)
    assert fresh.returncode == 0, fresh.stdout + fresh.stderr
    assert "trained 4 steps: loss" in fresh.stdout, "not complete already"
    ray = ("-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--")
    where = installed.run(*ray, "python", "-c", "import raymem; print('FROM', raymem.__file__)", folder=project)
    assert f"FROM {installed.packages}" in where.stdout, where.stdout + where.stderr
    train = ("python", "-m", "raymem", "train", "my.yaml", "--force", "--set", "name=other")
    direct = installed.run(*ray, *train, folder=project)
    assert direct.returncode == 0, direct.stdout + direct.stderr
    assert "trained 4 steps: loss" in direct.stdout
    assert (storage / "other" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_sweep(installed: Installed, tmp_path: Path, llama: Path, examples: Path) -> None:
    """The space and the data lie beside the recipe."""
    project = tmp_path / "project"
    storage = write_recipe(project, llama, "train.jsonl")
    shutil.copy(examples / "train.jsonl", project)
    (project / "mine.yaml").write_text("adapter.rank: {type: choice, choices: [2, 4]}\n")
    options = ("--space", "mine.yaml", "--budget", "1GiB", "--samples", "2", "--objective", "loss")
    done = installed.run("-m", "raymem", "submit", "my.yaml", "--command", "sweep", "--", *options, folder=project)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads((storage / "my-sweep" / "report" / "trials.json").read_text())
    assert trials, done.stdout
    assert "next: raymem train" in done.stdout
    assert (storage / "my-sweep" / "report" / "best.yaml").is_file()
    state = installed.run("-m", "raymem", "submit", "my.yaml", "--command", "sweep", "--status", folder=project)
    assert state.stdout == "raymem-my-sweep: SUCCEEDED\n", state.stdout + state.stderr


@pytest.mark.slow
def test_all_stages_of_loram(installed: Installed, tmp_path: Path, llama: Path, examples: Path) -> None:
    project = tmp_path / "project"
    write_recipe(project, llama, "train.jsonl", base=BASE)
    shutil.copy(examples / "train.jsonl", project)
    done = installed.run("-m", "raymem", "submit", "my.yaml", "--command", "loram run", folder=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified: " in done.stdout
    assert "adapter of the full model: " in done.stdout
    again = ("submit", "my.yaml", "--command", "loram verify", "--", "--no-forward")
    verified = installed.run("-m", "raymem", *again, folder=project)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "the models were not run" in verified.stdout

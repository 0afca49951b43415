"""A package of somebody else brings a kind of every axis, by entry points alone: the commands work with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import toy_kinds
from tests.helpers.commands import run_command, run_command_with
from tests.helpers.ray_processes import RayHead, running_head
from tests.helpers.run_files import losses, result_bytes
from tests.helpers.support import in_processes

ROOT = Path(__file__).parents[2]
ENTRY_POINTS = """
[raymem.adapters]
toy_scale = toykinds:ScaleKind
toy_vectors = toykinds:BiasKind
[raymem.activations]
toy_half = toykinds:HalfKind
[raymem.losses]
toy_smooth = toykinds:SmoothKind
[raymem.trackers]
toy_lines = toykinds:LinesKind
[raymem.optimizers]
toy_sign = toykinds:KnownSignKind
"""
TOYS = {
    "adapter": {"kind": "toy_scale", "layers": "v_proj"},
    "activations": "toy_half",
    "loss": {"kind": "toy_smooth", "smoothing": 0.2},
    "optimizer": {"kind": "toy_sign", "lr": 0.01},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What installing the package leaves in site-packages."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(str(toy_kinds.__file__), site / "toykinds.py")
    facts = site / "toykinds-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toykinds\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(ENTRY_POINTS)
    return site


def search_path(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


def raymem(site: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raymem", *(str(a) for a in arguments)]
    environment = {**os.environ, **search_path(site), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def write_recipe(folder: Path, model: Path, examples: Path, workers: int, **sections: Any) -> Path:
    path = folder / "toy.yaml"
    recipe = {
        "model": {"name": str(model)},
        "data": {"train": str(examples / "train.jsonl"), "eval": str(examples / "eval.jsonl"), "sequence_length": 32},
        "train": {"steps": 4, "global_batch": 4, "micro_batch": 2, "save_every": 2},
        "scaling": {"num_workers": workers, "resources_per_worker": {"CPU": 1}},
        "storage": {"path": str(folder / "runs")},
        "tracking": {"kind": "toy_lines", "file": str(folder / "tracked.jsonl")},
        **TOYS,
        **sections,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_they_are_planned_trained_resumed_and_evaluated(
    site: Path, llama: Path, examples: Path, tmp_path: Path
) -> None:
    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        """Each in a process of its own, as the shell has it."""
        (done,) = in_processes(run_command_with, 0, tmp_path / "meet", site, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    recipe = write_recipe(tmp_path, llama, examples, 0)
    plan = json.loads(command("plan", recipe, "--json").stdout)
    command("train", recipe, "--set", "train.steps=2")
    again = command("train", recipe)
    assert "resuming from step 2" in again.stdout + again.stderr
    assert f"tracked in {tmp_path}/tracked.jsonl" in again.stdout
    tracked = [json.loads(line) for line in (tmp_path / "tracked.jsonl").read_text().splitlines()]
    assert {row["step"] for row in tracked if "loss" in row} == {1, 2, 3, 4}
    assert tracked[-1] == {"status": "FINISHED", "artifacts": ["adapter"]}
    run = tmp_path / "runs" / "toy"
    facts = json.loads((run / "adapter" / "raymem.json").read_text())
    assert plan["step_peak_bytes"] == pytest.approx(facts["peak_bytes"], rel=0.01)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["raymem_kind"] == "toy_scale" and config["options"]["layers"] == "v_proj"
    evaluated = command("evaluate", recipe, "--json")
    assert json.loads(evaluated.stdout)["eval_loss"] == pytest.approx(facts["eval_loss"], rel=1e-5)


def test_without_the_package_the_kind_is_unknown(llama: Path, examples: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama, examples, 0)
    (refused,) = in_processes(run_command, 0, tmp_path / "meet", "plan", recipe)
    assert refused.returncode == 1
    assert "adapter.kind: 'toy_scale' is not one of none, lora, moram" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.fixture(scope="module")
def head(site: Path) -> Iterator[RayHead]:
    with running_head(**search_path(site)) as head:
        yield head


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_they_train_on_ray_and_a_sweep_searches_their_options(
    head: RayHead, site: Path, llama: Path, examples: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, llama, examples, 1)
    alone = raymem(site, "train", recipe, "--set", "scaling.num_workers=0", "--set", "name=alone", **head.client_env())
    assert alone.returncode == 0, alone.stdout + alone.stderr
    spread = raymem(site, "train", recipe, **head.client_env())
    assert spread.returncode == 0, spread.stdout + spread.stderr
    runs = tmp_path / "runs"
    assert losses(runs / "toy") == losses(runs / "alone")
    assert result_bytes(runs / "toy") == result_bytes(runs / "alone")
    space = tmp_path / "space.yaml"
    space.write_text(
        "optimizer.lr: {type: choice, choices: [0.001, 0.01]}\nloss.smoothing: {type: choice, choices: [0.0, 0.1]}\n"
    )
    options = ("--space", space, "--budget", "1GiB", "--samples", "2")
    swept = raymem(site, "sweep", recipe, *options, **head.client_env())
    assert swept.returncode == 0, swept.stdout + swept.stderr
    assert (runs / "toy-sweep" / "report" / "best.yaml").is_file()

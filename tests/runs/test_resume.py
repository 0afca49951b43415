"""A run that was killed ends exactly like one that was not, in every layout; layouts can be switched in between.

In the default tier one such death is a worker's of the job in test_finetune_job.py; each start here takes 20 s.
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml

from raymem.runs.train import launch
from tests.helpers.ray_processes import KillOnce, RayHead
from tests.helpers.run_files import losses, result_bytes
from tests.helpers.runs import ray_recipe, train_here
from tests.helpers.support import in_processes

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp-1": {"num_workers": 1},
    "ddp-2": {"num_workers": 2},
    "fsdp2-2": {"num_workers": 2, "strategy": "fsdp2"},
}
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mlorc": {"adapter": {"kind": "none"}, "optimizer": {"kind": "mlorc_adamw", "rank": 4, "min_dim": 16}},
    "loract": {"activations": {"kind": "loract", "rank": 8}},
    "moram": {"adapter": {"kind": "moram", "rank": 4, "density": 0.25}},
    "nf4": {"base": {"quantize": "nf4"}, "train": {"precision": "bf16"}},
}
Untouched = Callable[[str, str], tuple[list[float], bytes]]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def uninterrupted(llama: Path, examples: Path, storage: Path) -> Untouched:
    """Losses and adapter of a layout's run that nobody touched: the same loop in a plain gloo group, without Ray."""

    @functools.cache
    def run(layout: str, method: str) -> tuple[list[float], bytes]:
        name = f"untouched-{layout}-{method}"
        recipe = ray_recipe(llama, examples, storage, name, scaling=LAYOUTS[layout], **METHODS[method])
        world_size = 0 if layout == "ddp-1" else 2
        ranks = in_processes(train_here, world_size, storage / "meet", recipe)
        return ranks[0], result_bytes(storage / name)

    return run


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        ("ddp-1", "plain"),
        ("ddp-2", "plain"),
        ("ddp-1", "mlorc"),
        *(("fsdp2-2", method) for method in METHODS),
    ],
)
def test_sigkill_of_a_worker_changes_nothing(
    layout: str, method: str, cluster: RayHead, llama: Path, examples: Path, storage: Path, uninterrupted: Untouched
) -> None:
    name = f"killed-{layout}-{method}"
    killer = KillOnce(cluster, storage / name)
    killer.start()
    finished = launch(ray_recipe(llama, examples, storage, name, scaling=LAYOUTS[layout], **METHODS[method]))
    assert killer.killed is not None
    assert finished.outcome.started_at > 0, "the last session went on from a checkpoint"
    assert (losses(storage / name), result_bytes(storage / name)) == uninterrupted(layout, method)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exit_in_the_middle_of_a_step_changes_nothing(
    layout: str, cluster: RayHead, llama: Path, examples: Path, storage: Path, uninterrupted: Untouched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """``os._exit`` of the last rank in step 8, once."""
    name = f"exited-{layout}"
    marker = storage / f"{name}.marker"

    def exiting_worker(config: dict[str, Any]) -> dict[str, Any] | None:
        from raymem.cluster.train.worker import train_worker
        from raymem.training import loop
        from raymem.training.step import train_step as original

        def train_step(*arguments: Any, **options: Any) -> Any:
            step, last_rank = arguments[4], int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
            if step == 7 and last_rank and not marker.exists():
                marker.touch()
                os._exit(1)
            return original(*arguments, **options)

        loop.train_step = train_step  # type: ignore[attr-defined]
        return train_worker(config)

    monkeypatch.setattr("raymem.cluster.train.controller.train_worker", exiting_worker)
    launch(ray_recipe(llama, examples, storage, name, scaling=LAYOUTS[layout]))
    assert marker.exists()
    assert (losses(storage / name), result_bytes(storage / name)) == uninterrupted(layout, "plain")


def test_layouts_can_be_switched(cluster: RayHead, llama: Path, examples: Path, storage: Path) -> None:
    """0 workers -> 2 sharded workers under Ray -> 0 workers: the same rows in the same order, to rounding of sums."""
    same = {"adapter": {"dropout": 0.0}}  # dropout draws by rank
    for steps, scaling in ((16, {"num_workers": 0}), (28, LAYOUTS["fsdp2-2"]), (40, {"num_workers": 0})):
        train = {"steps": steps, "schedule": "constant"}
        launch(ray_recipe(llama, examples, storage, "switched", scaling=scaling, train=train, **same))
    launch(ray_recipe(llama, examples, storage, "straight", train={"schedule": "constant"}, **same))
    switched, straight = losses(storage / "switched"), losses(storage / "straight")
    assert switched[:16] == straight[:16]
    torch.testing.assert_close(torch.tensor(switched), torch.tensor(straight), rtol=1e-4, atol=0.0)


def test_elastic_group_goes_on_with_what_is_there(
    cluster: RayHead, llama: Path, examples: Path, storage: Path, uninterrupted: Untouched
) -> None:
    """Whatever number of workers each session gets, every step is taken once, on the same rows."""
    killer = KillOnce(cluster, storage / "elastic")
    killer.start()
    same = {"adapter": {"dropout": 0.0}}
    launch(ray_recipe(llama, examples, storage, "elastic", scaling={"num_workers": [1, 2]}, **same))
    launch(ray_recipe(llama, examples, storage, "alone", **same))
    assert killer.killed is not None
    elastic, alone = losses(storage / "elastic"), losses(storage / "alone")
    torch.testing.assert_close(torch.tensor(elastic), torch.tensor(alone), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("seed", range(2))
def test_sigkill_of_the_driver_loses_no_history(
    seed: int, cluster: RayHead, llama: Path, examples: Path, tmp_path: Path
) -> None:
    """Twice, at random steps, between two polls or not: each step has its line, and its value in MLflow."""
    total, chance = 60, random.Random(seed)
    train = {"steps": total, "save_every": 4, "schedule": "constant"}
    recipe = ray_recipe(llama, examples, tmp_path, "driven", scaling=LAYOUTS["ddp-1"], train=train, tracking="mlflow")
    (tmp_path / "driven.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    history = tmp_path / "driven" / "metrics.jsonl"
    for least, most in ((5, 20), (30, 45)):
        driver = subprocess.Popen(
            [sys.executable, "-m", "raymem", "train", str(tmp_path / "driven.yaml")], env=cluster.client_env(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        step = chance.randint(least, most)
        while driver.poll() is None and (not history.exists() or history.read_bytes().count(b"\n") < step):
            time.sleep(0.002)
        assert driver.poll() is None, "it ended before it was killed"
        driver.kill()
        driver.wait()
    finished = launch(recipe)
    assert finished.outcome.started_at >= 28
    seen = losses(tmp_path / "driven")
    assert len(seen) == total
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    values = {point.step: point.value for point in client.get_metric_history(str(finished.run_id), "loss")}
    assert [values.get(step) for step in range(1, total + 1)] == seen


def test_error_of_the_user_reaches_the_driver_without_retries(
    cluster: RayHead, llama: Path, examples: Path, storage: Path
) -> None:
    from raymem.errors import NonFiniteError

    diverging = {"lr": 1e30}
    recipe = ray_recipe(llama, examples, storage, "diverged", scaling=LAYOUTS["ddp-1"], optimizer=diverging)
    with pytest.raises(NonFiniteError, match=r"at step \d+; nothing of that step was saved"):
        launch(recipe)
    assert not (storage / "diverged" / "adapter").exists()

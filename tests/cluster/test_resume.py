"""A run that was killed ends exactly like one that was not, in every layout; layouts can be switched in between."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray_processes import RayHead
from run_files import losses, result_bytes
from runs import ray_recipe, train_here
from support import in_processes

from raymem.cluster.trainer import launch

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
}
Untouched = Callable[..., tuple[list[float], bytes]]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def uninterrupted(llama: Path, examples: Path, storage: Path) -> Untouched:
    """Losses and adapter of a layout's run that nobody touched: the same loop in a plain gloo group, without Ray."""

    @functools.cache
    def run(layout: str, method: str = "plain") -> tuple[list[float], bytes]:
        name = f"untouched-{layout}-{method}"
        recipe = ray_recipe(llama, examples, storage, name, scaling=LAYOUTS[layout], **METHODS[method])
        world_size = 0 if layout == "ddp-1" else 2
        ranks = in_processes(train_here, world_size, storage / "meet", recipe)
        return ranks[0], result_bytes(storage / name)

    return run


def workers_of(head: RayHead) -> list[psutil.Process]:
    """Ray Train workers of this session's cluster only."""
    found = psutil.Process(head.pid).children(recursive=True)
    return [process for process in found if "RayTrainWorker" in " ".join(process.cmdline())]


class KillOnce(threading.Thread):
    """SIGKILL one worker as soon as a run has a checkpoint."""

    def __init__(self, head: RayHead, run: Path) -> None:
        super().__init__(daemon=True)
        self.head, self.run_directory = head, run
        self.killed: int | None = None

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.killed is None:
            if list(self.run_directory.glob("checkpoints/step_*/manifest.json")):
                for process in workers_of(self.head)[-1:]:
                    process.send_signal(signal.SIGKILL)
                    self.killed = process.pid
            time.sleep(0.01)


SLOW = pytest.mark.slow  # a start of Ray Train takes some 20 s of CPU time; the default tier has the hardest death


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        ("fsdp2-2", "plain"),
        pytest.param("ddp-1", "plain", marks=SLOW),
        pytest.param("ddp-2", "plain", marks=SLOW),
        pytest.param("ddp-1", "mlorc", marks=SLOW),
        *(pytest.param("fsdp2-2", method, marks=SLOW) for method in METHODS if method != "plain"),
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


@SLOW
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exit_in_the_middle_of_a_step_changes_nothing(
    layout: str, cluster: RayHead, llama: Path, examples: Path, storage: Path, uninterrupted: Untouched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """``os._exit`` of the last rank in step 8, once."""
    name = f"exited-{layout}"
    marker = storage / f"{name}.marker"

    def exiting_worker(config: dict[str, Any]) -> dict[str, Any] | None:
        from raymem.cluster.worker import train_worker
        from raymem.training import loop

        original = loop.train_step

        def train_step(*arguments: Any, **options: Any) -> Any:
            step, last_rank = arguments[4], int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
            if step == 7 and last_rank and not marker.exists():
                marker.touch()
                os._exit(1)
            return original(*arguments, **options)

        loop.train_step = train_step
        return train_worker(config)

    monkeypatch.setattr("raymem.cluster.ray_train.train_worker", exiting_worker)
    launch(ray_recipe(llama, examples, storage, name, scaling=LAYOUTS[layout]))
    assert marker.exists()
    assert (losses(storage / name), result_bytes(storage / name)) == uninterrupted(layout)


@SLOW
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


@SLOW
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


@SLOW
def test_error_of_the_user_reaches_the_driver_without_retries(
    cluster: RayHead, llama: Path, examples: Path, storage: Path
) -> None:
    from raymem.errors import NonFiniteError

    diverging = {"lr": 1e30}
    recipe = ray_recipe(llama, examples, storage, "diverged", scaling=LAYOUTS["ddp-1"], optimizer=diverging)
    with pytest.raises(NonFiniteError, match=r"at step \d+; nothing was written"):
        launch(recipe)
    assert not (storage / "diverged" / "adapter").exists()

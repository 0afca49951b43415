"""An elastic group goes on with fewer workers when a node dies, and grows back when one comes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.faults.nodes import running_cluster
from tests.helpers.run_files import losses, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]
TRAIN = {
    "steps": 200_000,
    "global_batch": 4,
    "micro_batch": 2,
    "save_every": 100_000,
    "schedule": "constant",
    "warmup": 0,
}
SAME = {"adapter": {"dropout": 0.0}, "optimizer": {"lr": 1e-4}}  # dropout draws by rank, and rounding grows by steps


class Driver:
    """A command whose output is read as it comes."""

    def __init__(self, recipe: Path, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "raymem", "train", str(recipe)]
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines += iter(self.process.stdout.readline, "")

    def until(self, pattern: str, timeout_s: float = 300.0) -> re.Match[str]:
        deadline = time.monotonic() + timeout_s
        while (found := re.search(pattern, self.output)) is None:
            assert time.monotonic() < deadline and self.process.poll() is None, self.output[-4000:]
            time.sleep(0.2)
        return found

    @property
    def output(self) -> str:
        return " ".join("".join(self.lines).split())

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(300)
        self._reading.join()
        return status


def test_a_group_grows_back_and_loses_no_step(llama: Path, examples: Path, tmp_path: Path) -> None:
    scaling = {"num_workers": [1, 2], "resources_per_worker": {"CPU": 1, "slot": 1}}
    write_recipe(tmp_path / "elastic.yaml", tmp_path, llama, examples, train=TRAIN, scaling=scaling, **SAME)
    with running_cluster() as cluster:
        driver = Driver(tmp_path / "elastic.yaml", cluster.environment)
        try:
            driver.until(r"step \d+/")
            cluster.kill(cluster.busy_nodes()[-1])
            driver.until(r"the workers start again .* step \d+/")
            assert len(cluster.workers()) == 1
            cluster.fill_up()
            grown = driver.until(
                r"room for 2 workers now: the run goes on with so many from step (\d+), which was saved"
            )
            again = driver.until(rf"{re.escape(grown[0])}.*taking step (\d+), the first of this session")
            driver.until(rf"{re.escape(again[0])}.* step \d+/")
            assert len(cluster.workers()) == 2
            assert int(again[1]) == int(grown[1]) + 1, "nothing that was saved is taken again"
            assert driver.stop() == 143
        finally:
            driver.process.kill()
    taken = len(losses(tmp_path / "runs" / "elastic"))
    straight = TRAIN | {"steps": taken}
    write_recipe(tmp_path / "straight.yaml", tmp_path, llama, examples, train=straight, **SAME)
    command = [sys.executable, "-m", "raymem", "train", str(tmp_path / "straight.yaml")]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    runs = tmp_path / "runs"
    elastic, alone = torch.tensor(losses(runs / "elastic")), torch.tensor(losses(runs / "straight"))
    torch.testing.assert_close(elastic, alone, rtol=1e-2, atol=0.0)  # sums are rounded otherwise on two workers

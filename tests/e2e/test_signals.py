"""Signals end a command on Ray as they end one without: one sentence, 128 + number, no process left, and it goes on.

In the default tier test_tracked_run.py signals runs without Ray, and tests/cli/test_signals.py plays the rest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.helpers.ray_processes import RayHead, clean_environment
from tests.helpers.run_files import losses, result_bytes, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

RESUME = "the same command resumes from the last checkpoint"
NOISE = re.compile(r"SIG\w+ received|Traceback|\*\*\*|@ +0x|ERROR|WARNING|Exception ignored")


@pytest.fixture
def base() -> Iterator[Path]:
    """Where the command's own cluster has its directory; a short path, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def _hear_ctrl_c() -> None:
    """Tests that a script runs in its background ignore SIGINT, and would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """``raymem ARGUMENTS`` in a process group of its own, as a shell starts it."""

    def __init__(self, arguments: Sequence[object], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "raymem", *map(str, arguments)], env={**environment, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=_hear_ctrl_c,
        )  # fmt: skip

    def until(self, pattern: str) -> None:
        """Read its output as far as a line that begins like this."""
        assert self.process.stdout is not None
        read = []
        for line in self.process.stdout:
            read.append(line)
            if re.match(pattern, line):
                return
        pytest.fail(f"no line {pattern!r} in:\n{''.join(read)}{self.process.stderr and self.process.stderr.read()}")

    def signalled(self, *signals: signal.Signals) -> tuple[int, str]:
        """Send signals to the whole group, as a terminal does; returns its exit status and what it says on stderr."""
        for number in signals:
            os.killpg(self.process.pid, number)
            if len(signals) > 1:
                time.sleep(1.2)
        out, err = self.process.communicate(timeout=120)
        assert not NOISE.search(out + err), out + err
        return self.process.returncode, err


def left_below(base: Path) -> list[str]:
    """Processes and files of the command's cluster, a moment after its end."""
    ours = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAYMEM_RAY_DIRECTORY", "").startswith(str(base)):
                ours.append(process)
        except psutil.Error:
            continue
    _, alive = psutil.wait_procs(ours, timeout=10)
    return [*map(str, alive), *map(str, base.iterdir())]


def trained(recipe: Path, environment: dict[str, str]) -> tuple[list[float], bytes]:
    command = [sys.executable, "-m", "raymem", "train", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = recipe.parent / "runs" / recipe.stem
    return losses(run), result_bytes(run)


def newest_step(recipe: Path) -> int:
    newest = max((recipe.parent / "runs" / recipe.stem / "checkpoints").glob("step_*/manifest.json"))
    step: int = json.loads(newest.read_text())["step"]
    return step


def processes(command: Command, title: str) -> list[psutil.Process]:
    """Processes of the command's cluster with a title such as ray::RayTrainWorker."""
    return [child for child in children(command) if title in " ".join(child.cmdline())]


def test_a_worker_that_is_ended_saves_its_step_and_the_group_goes_on(recipes: Any, base: Path) -> None:
    environment = {**clean_environment(), "RAY_TMPDIR": str(base)}
    recipe = recipes("worker", 2)
    raw = yaml.safe_load(recipe.read_text())
    raw["train"]["save_every"] = 400
    recipe.write_text(yaml.safe_dump(raw))
    command = Command(["train", recipe], environment)
    command.until(r"step \d")
    processes(command, "RayTrainWorker")[-1].send_signal(signal.SIGTERM)
    out, err = command.process.communicate(timeout=800)
    assert command.process.returncode == 0, out + err
    assert re.search(
        r"worker \d failed: .*its process got SIGTERM, and every step is saved; the workers start again", out + err
    )
    resumed = re.search(r"taking step (\d+), the first of this session", out)
    assert resumed is not None and int(resumed[1]) > 1, out
    straight = recipes("straight", 2)
    expected = trained(straight, environment)
    run = recipe.parent / "runs" / recipe.stem
    assert (losses(run), result_bytes(run)) == expected


@pytest.fixture
def recipes(llama: Path, examples: Path, tmp_path: Path) -> Any:
    def write(name: str, workers: int) -> Path:
        scaling = {"num_workers": workers, "resources_per_worker": {"CPU": 1}}
        train = {"steps": 400, "global_batch": 4, "micro_batch": 2, "save_every": 20, "eval_every": 200}
        return write_recipe(tmp_path / f"{name}.yaml", tmp_path, llama, examples, scaling=scaling, train=train)

    return write


@pytest.mark.parametrize(("workers", "sent"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_training_ends_and_the_same_command_gives_the_undisturbed_result(
    workers: int, sent: signal.Signals, recipes: Any, base: Path
) -> None:
    environment = {**clean_environment(), "RAY_TMPDIR": str(base)}
    recipe = recipes("signalled", workers)
    for where, number in ((r"starting workers \(0", signal.SIGHUP), (r"step \d", sent)):
        command = Command(["train", recipe], environment)
        command.until(where)
        word = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
        status, said = command.signalled(number)
        if number == signal.SIGTERM:
            word += f" once step {newest_step(recipe)} was saved"
        assert (status, said) == (128 + number, f"{word}; {RESUME}\n")
        assert left_below(base) == []
    assert trained(recipe, environment) == trained(recipes("straight", workers), environment)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_while_ray_starts_is_not_lost(number: signal.Signals, recipes: Any, base: Path) -> None:
    """Ray brings handlers of its own, of which one prints a stack."""
    command = Command(["train", recipes("starting", 1)], {**clean_environment(), "RAY_TMPDIR": str(base)})
    command.until("starting Ray")
    deadline = time.monotonic() + 60
    while not any("gcs_server" in " ".join(child.cmdline()) for child in children(command)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    status, said = command.signalled(number)
    assert (status, said.endswith(f"; {RESUME}\n"), said.count("\n")) == (128 + number, True, 1)
    assert left_below(base) == []


def children(command: Command) -> list[psutil.Process]:
    return [child for child in psutil.Process(command.process.pid).children(recursive=True) if child.is_running()]


def test_a_second_ctrl_c_leaves_at_once_and_tidily(recipes: Any, base: Path) -> None:
    command = Command(["train", recipes("twice", 1)], {**clean_environment(), "RAY_TMPDIR": str(base)})
    command.until("step 1/")
    assert command.signalled(signal.SIGINT, signal.SIGINT) == (130, f"interrupted; {RESUME}\n")
    assert left_below(base) == []


def test_a_driver_on_a_cluster_of_others_leaves_that_as_it_was(recipes: Any, ray_head: RayHead) -> None:
    recipe = recipes("joined", 2)
    command = Command(["train", recipe], ray_head.client_env())
    command.until("step 1/")
    status, said = command.signalled(signal.SIGTERM)
    assert (status, said) == (143, f"stopped by SIGTERM once step {newest_step(recipe)} was saved; {RESUME}\n")
    workers = [child for child in psutil.Process(ray_head.pid).children(recursive=True) if _is_worker(child)]
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_a_sweep_and_a_pruning_end_so_too(recipes: Any, base: Path, tmp_path: Path) -> None:
    environment = {**clean_environment(), "RAY_TMPDIR": str(base)}
    recipe = recipes("swept", 0)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"adapter.rank": {"type": "int", "low": 2, "high": 8}}))
    options = ["--space", tmp_path / "space.yaml", "--budget", "100MiB", "--samples", 3, "-s", "train.steps=20000"]
    for number, word in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped by SIGTERM")):
        command = Command(["sweep", recipe, *options], environment)
        command.until(r"\[0/3 done, \d running")
        assert command.signalled(number) == (128 + number, f"{word}; the same command goes on\n")
        assert left_below(base) == []
    pruned = "base={kind: loram, criterion: magnitude, layer_ratios: [0.5, 0.75]}"
    command = Command(["loram", "run", recipes("pruned", 1), "-s", pruned], environment)
    command.until("pruning ")
    assert command.signalled(signal.SIGINT) == (130, "interrupted; the same command goes on where it was\n")
    assert left_below(base) == []

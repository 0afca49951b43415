"""The cluster that raymem starts by itself: who can reach it, what it leaves, and what a driver that dies leaves."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymem.cluster import local
from tests.helpers.ray_processes import clean_environment
from tests.helpers.run_files import write_recipe

START = """
from raymem.cluster import connection
from raymem.recipe.schema import ScalingSection
connection.connect(ScalingSection(num_workers=1))
"""


@pytest.fixture
def base() -> Iterator[Path]:
    """Where local clusters have their directories in a test; a short path, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def environment(base: Path) -> dict[str, str]:
    return {**clean_environment(), "RAY_TMPDIR": str(base)}


def marked(base: Path) -> list[psutil.Process]:
    """Processes of clusters below the base, the driver not among them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAYMEM_RAY_DIRECTORY", "").startswith(str(base)):
                found.append(process)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def name_of(process: psutil.Process) -> str:
    """What a process calls itself; nothing if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def listeners(processes: list[psutil.Process]) -> set[str]:
    """Addresses on which processes listen, as ``ss`` sees them."""
    pids = {process.pid for process in processes}
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[3] for line in lines if pids & {int(pid) for pid in re.findall(r"pid=(\d+)", line)}}


def test_what_dead_drivers_left_is_removed_and_what_living_ones_have_stays(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(base))
    left, used = base / "raymem-ray-1-left", base / "raymem-ray-2-used"
    helpers = {}
    for directory in (left, used):
        (directory / "session_1" / "logs").mkdir(parents=True)
        (directory / "session_latest").symlink_to("session_1")
        (directory / "owner").touch()
        helpers[directory] = subprocess.Popen(["sleep", "60"], env={"RAYMEM_RAY_DIRECTORY": str(directory)})
    try:
        with (used / "owner").open() as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            local.remove_abandoned()
        assert list(base.iterdir()) == [used]
        assert helpers[left].wait(10) == -signal.SIGKILL
        assert helpers[used].poll() is None
    finally:
        for helper in helpers.values():
            helper.kill()
            helper.wait()


def test_a_start_that_takes_too_long_is_tried_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def init(_temp_dir: str, **options: Any) -> None:
        assert (Path(_temp_dir) / "owner").exists()
        started.append(_temp_dir)
        if len(started) == 1:
            raise Exception("The current node timed out during startup. This could happen because ...")
        if len(started) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setenv("RAY_TMPDIR", str(base))
    monkeypatch.setattr(local, "_own", None)
    monkeypatch.setattr("ray.init", init)
    local.start()
    assert [str(path) for path in base.iterdir()] == started[1:], "the first try left nothing"
    with pytest.raises(OSError, match="No space left"):
        local.start()
    assert list(base.iterdir()) == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(shutil.which("ss") is None, reason="ss (iproute2) is not on the PATH")
def test_it_listens_on_loopback_only_wants_a_token_and_leaves_nothing(
    base: Path, llama: Path, examples: Path, tmp_path: Path
) -> None:
    scaling = {"num_workers": 1, "resources_per_worker": {"CPU": 1}}
    train = {"steps": 300, "global_batch": 4, "micro_batch": 2, "save_every": 300, "eval_every": 300}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path, llama, examples, scaling=scaling, train=train)
    driver = subprocess.Popen(
        [sys.executable, "-m", "raymem", "train", str(recipe)], env=environment(base), stdout=subprocess.PIPE, text=True
    )
    try:
        assert driver.stdout is not None
        assert any(line.startswith("step ") for line in driver.stdout)
        own = psutil.Process(driver.pid)
        processes = [own, *own.children(recursive=True)]
        (worker,) = [process for process in processes if "RayTrainWorker" in name_of(process)]
        worker.suspend()  # so that it is still there
        ports = listeners(processes)
        assert len(ports) > 5
        loopback = re.compile(r"(127\.0\.0\.1|\[::ffff:127\.0\.0\.1\]|\[::1\]):\d+")
        assert {port for port in ports if not loopback.fullmatch(port)} == set()
        (gcs,) = listeners([process for process in processes if "gcs_server" in name_of(process)])
        worker.resume()
        assert "AuthenticationError" in asked_without_token(f"127.0.0.1:{gcs.rpartition(':')[2]}")
        driver.stdout.read()
        assert driver.wait(60) == 0
    finally:
        for process in [*psutil.Process(driver.pid).children(recursive=True), driver] if driver.poll() is None else []:
            process.kill()
    assert list(base.iterdir()) == []
    assert not list((tmp_path / "runs").rglob(".validate_storage_marker"))
    psutil.wait_procs(marked(base), timeout=10)
    assert marked(base) == []


def asked_without_token(gcs: str) -> str:
    """What the head says to another user of this machine."""
    program = (
        "from ray._raylet import GcsClient\n"
        f"try: print(GcsClient(address='{gcs}').internal_kv_keys(b'', None, timeout=10))\n"
        "except Exception as error: print(type(error).__name__)"
    )
    nobody = {**clean_environment(), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", program], env=nobody, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("after", ["gcs_server", "raylet", "dashboard/agent.py"])
def test_what_a_driver_leaves_that_is_killed_while_ray_starts_goes_with_the_next_start(base: Path, after: str) -> None:
    driver = subprocess.Popen([sys.executable, "-c", START + "import time; time.sleep(60)"], env=environment(base))
    while not any(after in name_of(process) for process in marked(base)):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert len(list(base.iterdir())) == 1
    subprocess.run([sys.executable, "-c", START], env=environment(base), check=True, timeout=200)
    psutil.wait_procs(marked(base), timeout=10)
    assert marked(base) == []
    assert list(base.iterdir()) == []

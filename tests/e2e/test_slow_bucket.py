"""Commands whose checkpoints take seconds to upload: signals wait for them or leave, and the bits are the same."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymem.storage.storage import Storage
from raymem.training.history import read_history
from tests.helpers.faulty_proxy import FaultyProxy, proxy_before
from tests.helpers.run_files import losses, result_bytes, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NOISE = re.compile(r"Traceback|terminate called|Fatal|Exception ignored|\*\*\*")
STEPS = 60


@pytest.fixture
def proxy(s3_uri: str) -> Iterator[FaultyProxy]:
    with proxy_before(s3_uri) as before:
        yield before


@pytest.fixture
def remote(s3_uri: str, tmp_path: Path) -> Storage:
    return Storage.open(s3_uri).child(tmp_path.name)


@pytest.fixture
def command(llama: Path, examples: Path, tmp_path: Path) -> Any:
    """Starts ``raymem train`` with a recipe that checkpoints every 10 steps."""

    def start(name: str, storage: str, workers: int) -> subprocess.Popen[str]:
        train = {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "save_every": 10, "eval_every": STEPS}
        scaling = {"num_workers": workers, "resources_per_worker": {"CPU": 1}} if workers else {"num_workers": 0}
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", tmp_path, llama, examples, train=train, scaling=scaling,
            storage={"path": storage},
        )  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "raymem", "train", str(recipe)],
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": "/tmp"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit status, and what was said."""
    out, err = process.communicate(timeout=500)
    assert not NOISE.search(out + err), out + err
    return process.returncode, out + err


def wait_for(storage: Storage, pattern: str, process: subprocess.Popen[str]) -> None:
    """Wait until a file of a checkpoint is there."""
    while True:
        names = [f"{step}/{file}" for step in storage.list_dirs("run/checkpoints")
                 for file in storage.sizes(f"run/checkpoints/{step}")]  # fmt: skip
        if any(re.search(pattern, name) for name in names):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def newest_whole(storage: Storage) -> int:
    steps = storage.list_dirs("run/checkpoints")
    return max(int(step[5:]) for step in steps if storage.exists(f"run/checkpoints/{step}/manifest.json"))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.ray)])
def test_sigterm_waits_for_the_upload_and_the_run_goes_on_to_the_same_bits(
    workers: int, proxy: FaultyProxy, remote: Storage, command: Any, tmp_path: Path
) -> None:
    proxy.slow(0.2)
    process = command("run", proxy.uri(remote.path), workers)
    wait_for(remote, r"step_00000010/manifest", process)
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    saved = newest_whole(remote)
    assert status == 143 and f"stopped by SIGTERM once step {saved} was saved" in said, said
    assert 10 <= saved < STEPS
    proxy.back()
    status, said = ended(command("run", proxy.uri(remote.path), workers))
    assert status == 0 and f"taking step {saved + 1}, the first of this session" in said, said
    assert ended(command("straight", str(tmp_path / "disk"), workers))[0] == 0
    rows = read_history(remote.child("run"), STEPS)
    assert [row["loss"] for row in rows] == losses(tmp_path / "disk" / "straight")
    remote.download_dir("run/adapter", tmp_path / "fetched" / "adapter", last="raymem.json")
    assert result_bytes(tmp_path / "fetched") == result_bytes(tmp_path / "disk" / "straight")


def test_ctrl_c_does_not_wait_for_a_store_that_is_silent(
    proxy: FaultyProxy, remote: Storage, command: Any, tmp_path: Path
) -> None:
    process = command("run", proxy.uri(remote.path), 0)
    wait_for(remote, r"step_00000010/manifest", process)
    proxy.away("hang")
    time.sleep(2.0)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    status, said = ended(process)
    assert status == 130 and "the same command resumes from the last checkpoint" in said, said
    proxy.back()
    assert newest_whole(remote) >= 10
    assert time.monotonic() - began < 120

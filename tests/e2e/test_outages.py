"""A run whose bucket goes away, between checkpoints and in the middle of one, ends as one whose bucket did not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from raymem.errors import TransientStorageError
from raymem.recipe.schema import Recipe
from raymem.runs.train import launch
from raymem.storage.storage import Storage
from raymem.training.history import read_history
from raymem.training.reporter import Row
from tests.helpers.faulty_proxy import FaultyProxy, ends_when_noticed, proxy_before
from tests.helpers.support import make_recipe, run_fragment


@pytest.fixture
def proxy(s3_uri: str) -> Iterator[FaultyProxy]:
    with proxy_before(s3_uri) as before:
        yield before


def recipe_on(storage: str, llama: Path, examples: Path, steps: int, **storage_keys: object) -> Recipe:
    places = run_fragment(examples, Path("/unused"), evaluated=True)
    changes = {
        "name": "run",
        "train": {"steps": steps, "save_every": 3},
        "storage": {"path": storage, **storage_keys},
    }
    return make_recipe(places, changes, model=llama)


def result(storage: Storage, folder: Path) -> bytes:
    storage.download_dir("run/adapter", folder, last="raymem.json")
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(llama: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    disk = tmp_path_factory.mktemp("disk")
    launch(recipe_on(str(disk), llama, examples, 9))
    return (disk / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_when_its_bucket_is_back(
    proxy: FaultyProxy, s3_uri: str, llama: Path, examples: Path, tmp_path: Path, undisturbed: bytes,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three seconds each time, from when it is noticed."""
    remote = Storage.open(s3_uri).child(tmp_path.name)
    ends_when_noticed(proxy, monkeypatch, after_s=3.0)

    def disturb(rows: Sequence[Row]) -> None:
        if rows[-1]["step"] == 2:
            proxy.away()
        if rows[-1]["step"] == 5:
            wait_for(remote, "run/checkpoints/step_00000003/manifest.json")  # which steps do not
            proxy.away("reset", at="step_00000006/shard")

    launch(recipe_on(proxy.uri(remote.path), llama, examples, 9), listeners=[disturb])
    assert result(remote, tmp_path / "fetched") == undisturbed
    assert [row["step"] for row in read_history(remote.child("run"), 9)] == list(range(1, 10))
    assert remote.list_dirs("run/checkpoints") == ["step_00000006", "step_00000009"]
    said = [record.getMessage() for record in caplog.records if record.name == "raymem.storage.retry"]
    assert ["is back after" in line for line in said] == [False, True, False, True]
    assert re.search(r"cannot write .*run/metrics\.jsonl", said[0])
    assert re.search(r"cannot write .*run/checkpoints/step_00000006/shard", said[2])


@pytest.mark.slow
def test_what_is_away_too_long_stops_the_run_and_is_resumed(
    proxy: FaultyProxy, s3_uri: str, llama: Path, examples: Path, tmp_path: Path, undisturbed: bytes
) -> None:
    remote = Storage.open(s3_uri).child(tmp_path.name)
    recipe = recipe_on(proxy.uri(remote.path), llama, examples, 9, retry_for=0.5)

    def disturb(rows: Sequence[Row]) -> None:
        if rows[-1]["step"] == 5:
            proxy.away("reset", at="step_00000006/shard")

    with pytest.raises(TransientStorageError, match=r"^storage: cannot .*/step_00000006/shard.*tried for"):
        launch(recipe, listeners=[disturb])
    proxy.back()
    assert launch(recipe).outcome.started_at == 3
    assert result(remote, tmp_path / "fetched") == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_minute_without_the_bucket(
    workers: int, proxy: FaultyProxy, s3_uri: str, llama: Path, examples: Path, tmp_path: Path
) -> None:
    """Between two checkpoints, and in the middle of one; the command's own Ray has the worker."""
    remote = Storage.open(s3_uri).child(tmp_path.name)
    steps = 60
    recipe = recipe_on(proxy.uri(remote.path), llama, examples, steps).to_dict()
    recipe["train"]["save_every"] = 10
    straight = {**recipe, "storage": {"path": str(tmp_path / "disk")}}
    recipe["scaling"]["num_workers"] = workers
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    launch(Recipe.model_validate(straight))

    def disturb() -> None:
        wait_for(remote, "run/checkpoints/step_00000010/manifest.json")
        proxy.away(for_s=60.0)
        wait_for(remote, "run/checkpoints/step_00000020/manifest.json")
        proxy.away("refuse", at="step_00000040/shard", for_s=60.0)

    threading.Thread(target=disturb, daemon=True).start()
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "raymem", "train", str(tmp_path / "run.yaml")],
        env={**os.environ, "TMPDIR": "/tmp"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began > 120
    assert f"trained {steps} steps: loss" in done.stdout, "no session was restarted"
    said = "worker 0: storage: " if workers else "storage: "
    assert len(re.findall(f"{said}.*trying again for up to 5 min", done.stdout + done.stderr)) == 2
    assert len(re.findall(f"{said}.*is back after", done.stdout + done.stderr)) == 2
    on_disk = (tmp_path / "disk" / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert result(remote, tmp_path / "fetched") == on_disk


def wait_for(storage: Storage, name: str) -> None:
    while not storage.exists(name):
        time.sleep(0.05)

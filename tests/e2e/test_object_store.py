"""A whole run on s3:// (a moto server on loopback): the same result as on disk, from any machine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from raymem.recipe.schema import Recipe
from raymem.runs.evaluate import evaluate_recipe
from raymem.runs.train import launch
from raymem.storage.storage import Storage
from raymem.training.artifacts.export import export_final
from tests.helpers.support import make_recipe, run_fragment


def recipe_on(storage: str, llama: Path, examples: Path, steps: int) -> Recipe:
    places = run_fragment(examples, Path("/unused"), evaluated=True)
    train = {"steps": steps, "save_every": 3, "schedule": "constant", "warmup": 0}
    return make_recipe(places, {"name": "remote", "train": train, "storage": {"path": storage}}, model=llama)


def another_machine(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Give this process an empty temporary directory and an empty cache."""
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    monkeypatch.setenv("RAYMEM_CACHE", str(path / "cache"))


def adapter(storage: Storage, folder: Path) -> bytes:
    storage.download_dir("remote/adapter", folder, last="raymem.json")
    return (folder / "adapter_model.safetensors").read_bytes()


def test_run_on_s3_equals_a_run_on_disk(
    s3_uri: str, llama: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Storage.open(s3_uri).child(tmp_path.name)
    another_machine(monkeypatch, tmp_path / "first")
    launch(recipe_on(remote.path, llama, examples, steps=4))
    assert remote.list_dirs("remote/checkpoints") == ["step_00000003", "step_00000004"]
    (shards,) = remote.list_dirs("cache/data")[:1]
    assert json.dumps(remote.read_json(f"cache/data/{shards}/manifest.json"))

    another_machine(monkeypatch, tmp_path / "second")
    finished = launch(recipe_on(remote.path, llama, examples, steps=8))
    assert finished.outcome.started_at == 4
    assert (tmp_path / "second" / "cache" / "data" / shards).is_dir()
    launch(recipe_on(str(tmp_path / "disk"), llama, examples, steps=8))
    on_disk = (tmp_path / "disk" / "remote" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert adapter(remote, tmp_path / "fetched") == on_disk
    evaluated = evaluate_recipe(recipe_on(remote.path, llama, examples, steps=8))
    assert evaluated.result.loss == pytest.approx(finished.outcome.eval_loss, abs=1e-6)


def test_damaged_data_are_made_again(
    s3_uri: str,
    llama: Path,
    examples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    remote = Storage.open(s3_uri).child(tmp_path.name)
    another_machine(monkeypatch, tmp_path / "first")
    launch(recipe_on(remote.path, llama, examples, steps=1))
    for key in remote.list_dirs("cache/data"):
        manifest = remote.read_json(f"cache/data/{key}/manifest.json")
        name = next(iter(manifest["files"]))
        with remote.filesystem.open_output_stream(f"{remote.root}/cache/data/{key}/{name}") as stream:
            stream.write(b"x" * manifest["files"][name]["bytes"])
    another_machine(monkeypatch, tmp_path / "second")
    launch(recipe_on(remote.path, llama, examples, steps=2))
    assert "is damaged: it has sha256" in caplog.text and "the data are made again" in caplog.text
    for key in remote.list_dirs("cache/data"):
        remote.download_dir(f"cache/data/{key}", tmp_path / "third" / key)


def test_a_damaged_checkpoint_gives_way_to_an_older_one(
    s3_uri: str, llama: Path, examples: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = Storage.open(s3_uri).child(tmp_path.name)
    launch(recipe_on(remote.path, llama, examples, steps=4))
    newest = "remote/checkpoints/step_00000004"
    (name,) = (name for name in remote.sizes(newest) if name != "manifest.json")
    content = bytearray(remote.read_bytes(f"{newest}/{name}"))
    content[-1] ^= 1
    with remote.filesystem.open_output_stream(f"{remote.root}/{newest}/{name}") as stream:
        stream.write(bytes(content))
    finished = launch(recipe_on(remote.path, llama, examples, steps=8))
    assert finished.outcome.started_at == 3
    assert f"{name} has other bytes than were written" in caplog.text
    assert remote.read_bytes(f"remote/checkpoints/damaged-step_00000004/{name}") == content
    launch(recipe_on(str(tmp_path / "disk"), llama, examples, steps=8))
    on_disk = (tmp_path / "disk" / "remote" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert adapter(remote, tmp_path / "fetched") == on_disk


def test_the_best_checkpoint_leaves_no_copy(
    s3_uri: str, llama: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even until the process ends: a worker of Ray does so without tidying up."""
    remote, node = Storage.open(s3_uri).child(tmp_path.name), tmp_path / "node"
    another_machine(monkeypatch, node)
    left: list[list[str]] = []

    def export(*arguments: Any) -> str:
        left.append([path.name for path in node.iterdir() if "checkpoint" in path.name])
        return export_final(*arguments)

    monkeypatch.setattr("raymem.training.loop.export_final", export)
    recipe = recipe_on(remote.path, llama, examples, steps=2)
    launch(recipe.model_copy(update={"storage": recipe.storage.model_copy(update={"keep": "best"})}))
    assert left == [[]]

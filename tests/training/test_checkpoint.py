"""A checkpoint is whole or not there, and comes back bit for bit."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pkgutil
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import CheckpointError, StorageError
from raymem.storage import storage as storage_module
from raymem.storage.connect import copy_file
from raymem.storage.publish import seal
from raymem.storage.storage import Storage
from raymem.training import checkpoint
from raymem.training.checkpoint import Checkpoints, latest_manifest, latest_recipe
from raymem.training.dist_env import DistEnv
from raymem.training.manifest import SCHEMA_VERSION, Manifest
from tests.helpers.small_disk import mount_small_disk
from tests.helpers.support import assert_same, in_processes, make_recipe

RECIPE = make_recipe().to_dict()


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """What a state may hold: matrices, vectors, scalars, both dtypes, and values that compare oddly."""
    source = torch.Generator().manual_seed(seed)
    return {
        "weights.a.b": torch.randn(5, 3, generator=source).bfloat16(),
        "master.a.b": torch.randn(5, 3, generator=source),
        "optimizer.a.b.step": torch.tensor(float(seed)),
        "optimizer.a.b.exp_avg": torch.tensor([-0.0, float("nan"), float("inf"), 1e-45, float(seed)]),
    }


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors(0).items()}


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "run"))


def save(run: Storage, step: int, *, loss: float | None = None, keep: str = "last", number: int = 2) -> None:
    manifest = Manifest(step, {"seed": 0, "train.global_batch": 4}, RECIPE, loss)
    Checkpoints(run, DistEnv()).save(manifest, tensors(step), keep, number)


def steps(run: Storage) -> list[int]:
    return [int(name.removeprefix("step_")) for name in run.list_dirs("checkpoints") if not name.startswith(".")]


def test_what_was_saved_comes_back_bitwise(run: Storage) -> None:
    save(run, 3, loss=0.5)
    checkpoints = Checkpoints(run, DistEnv())
    manifest = checkpoints.latest()
    assert manifest is not None
    assert (manifest.step, manifest.eval_loss, manifest.recipe) == (3, 0.5, RECIPE)
    assert manifest.identity == {"seed": 0, "train.global_batch": 4}
    found = zeros()
    places = {name: value.data_ptr() for name, value in found.items()}
    checkpoints.load(manifest, found)
    assert_same(found, tensors(3))
    assert {name: value.data_ptr() for name, value in found.items()} == places, "read into the given tensors"


def test_on_an_object_store_every_byte_is_read_once(
    run: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Digests are those of what is copied, on the way there and back; a damaged copy gives way to an older one."""
    monkeypatch.setattr(Storage, "is_local", property(lambda storage: False))
    copied: list[str] = []

    def copy(source: Any, path: str, target: Any, to: str) -> Any:
        copied.append(Path(path).name)
        Path(to).parent.mkdir(parents=True, exist_ok=True)  # an object store needs none
        return original(source, path, target, to)

    def read_again(*_: Any) -> str:
        raise AssertionError("a file is read for its digest alone")

    original = copy_file
    monkeypatch.setattr(storage_module, "copy_file", copy)
    monkeypatch.setattr(Storage, "sha256", read_again)
    monkeypatch.setattr(checkpoint, "file_sha256", read_again)
    save(run, 1)
    save(run, 2)
    assert len(copied) == 2
    copied.clear()
    checkpoints, found = Checkpoints(run, DistEnv()), zeros()
    manifest = checkpoints.latest()
    assert manifest is not None and manifest.step == 2
    checkpoints.load(manifest, found)
    assert_same(found, tensors(2))
    assert sorted(copied) == sorted({*copied}), "a file was fetched twice"

    (shard,) = (Path(run.root) / "checkpoints/step_00000002").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4
    shard.write_bytes(data)
    manifest = checkpoints.latest()
    assert manifest is not None and manifest.step == 1
    assert "has other bytes than were written (SHA-256)" in caplog.text
    checkpoints.load(manifest, found)
    assert_same(found, tensors(1))


def test_a_checkpoint_of_earlier_versions_is_read(run: Storage) -> None:
    """They knew one hook, and also wrote down what follows from step and recipe, which nothing ever read."""
    save(run, 3)
    before, path = latest_manifest(run), "checkpoints/step_00000003/manifest.json"
    assert before is not None and before.hooks == {}
    raw = run.read_json(path)
    assert not {"cursor", "rng", "schedule", "ranks"} & raw.keys()
    del raw["hooks"], raw["sha256"]
    raw["files"] = {name: {"bytes": facts["bytes"]} for name, facts in raw["files"].items()}
    old = {**raw, "schema": 1, "cursor": {"step": 3}, "rng": {"seed": 0, "step": 3}, "schedule": {"step": 3}}
    run.write_json(path, {**old, "ranks": {}})
    before = dataclasses.replace(before, files=raw["files"])
    assert latest_manifest(run) == before == Checkpoints(run, DistEnv()).latest()
    run.write_json(path, {**old, "ranks": {"layers.0": 5}})
    assert latest_manifest(run) == dataclasses.replace(before, hooks={"loract": {"ranks": {"layers.0": 5}}})


def test_a_run_without_checkpoints_has_none(run: Storage) -> None:
    assert latest_manifest(run) is None
    assert Checkpoints(run, DistEnv()).best() is None


def test_only_safetensors_and_json_are_written(run: Storage) -> None:
    save(run, 1)
    files = [path for path in Path(run.root).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK")), "neither a pickle nor a zip of them"
    assert not list(Path(run.root).rglob(".*")), "no staging is left"


@pytest.mark.parametrize(
    ("keep", "number", "expected"),
    [("last", 2, [3, 4]), ("last", 1, [4]), ("last", 9, [1, 2, 3, 4]), ("best", 1, [2, 4]), ("best", 2, [2, 3, 4])],
)
def test_retention(run: Storage, keep: str, number: int, expected: list[int]) -> None:
    for step, loss in ((1, 0.9), (2, 0.1), (3, 0.5), (4, 0.8)):
        save(run, step, loss=loss, keep=keep, number=number)
    assert steps(run) == expected
    best, latest = Checkpoints(run, DistEnv()).best(), latest_manifest(run)
    assert latest is not None and latest.step == 4
    if keep == "best":
        assert best is not None and best.step == 2


def test_of_equal_losses_the_newer_is_best_and_nan_is_worst(run: Storage) -> None:
    for step, loss in ((1, float("nan")), (2, 0.5), (3, 0.5), (4, float("nan"))):
        save(run, step, loss=loss, keep="best", number=9)
    best = Checkpoints(run, DistEnv()).best()
    assert best is not None and best.step == 3


def test_a_replayed_step_replaces_its_older_self(run: Storage) -> None:
    save(run, 1)
    Checkpoints(run, DistEnv()).save(Manifest(1, {}, RECIPE, None), tensors(7), "last", 2)
    found = zeros()
    manifest = latest_manifest(run)
    assert manifest is not None
    Checkpoints(run, DistEnv()).load(manifest, found)
    assert_same(found, tensors(7))
    assert steps(run) == [1]


def test_what_is_half_written_is_never_seen(run: Storage) -> None:
    save(run, 1)
    folder = Path(run.join("checkpoints"))
    shutil.copytree(folder / "step_00000001", folder / ".step_00000002.part")
    shutil.copytree(folder / "step_00000001", folder / "step_00000003")
    (folder / "step_00000003" / "manifest.json").unlink()
    manifest = latest_manifest(run)
    assert manifest is not None and manifest.step == 1
    save(run, 2)  # over what a killed process left
    save(run, 3)
    assert latest_manifest(run).step == 3  # type: ignore[union-attr]
    assert not list(folder.glob(".*"))


def shard(run: Storage, step: int) -> Path:
    (path,) = Path(run.join("checkpoints", f"step_{step:08d}")).glob("*.safetensors")
    return path


def good_step(run: Storage) -> int:
    manifest = Checkpoints(run, DistEnv()).latest()
    assert manifest is not None
    found = zeros()
    Checkpoints(run, DistEnv()).load(manifest, found)
    assert_same(found, tensors(manifest.step))
    return manifest.step


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_a_truncated_shard_is_named_and_set_aside(run: Storage, caplog: pytest.LogCaptureFixture) -> None:
    save(run, 1)
    save(run, 2)
    path = shard(run, 2)
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    assert good_step(run) == 1
    aside = path.parent.with_name("damaged-step_00000002")
    assert f"{path.parent}: {path.name} has {len(content) - 8} bytes instead of {len(content)}" in caplog.text
    assert (aside / path.name).read_bytes() == content[:-8], "set aside as it was"
    shard(run, 1).unlink()
    for _ in range(2):  # and not from the start when the same command is given again
        with pytest.raises(CheckpointError, match=r"damaged-step_0000000\d: damaged, .* no good checkpoint.*--fresh"):
            latest_manifest(run)
    aside.rename(path.parent)
    (path.parent / path.name).write_bytes(content)  # the cure that the error names
    assert good_step(run) == 2


def test_any_flipped_bit_is_noticed(run: Storage, caplog: pytest.LogCaptureFixture) -> None:
    """In the header, in each tensor, in the manifest: weights, moments and the step's count alike."""
    save(run, 1, loss=0.5)
    save(run, 2, loss=0.25)
    folder = shard(run, 2).parent
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) == 2
    flips = [(name, at) for name, content in whole.items() for at in range(0, len(content), len(content) // 60)]
    for number, (name, at) in enumerate(flips):
        flip(folder / name, at, number % 8)
        caplog.clear()
        assert good_step(run) == 1, (name, at)
        assert f"{folder}: {name}" in caplog.text
        aside = folder.with_name("damaged-step_00000002")
        aside.rename(folder)
        (folder / name).write_bytes(whole[name])
    assert good_step(run) == 2


def test_a_second_damage_of_a_step_is_kept_too(run: Storage) -> None:
    save(run, 1)
    for _ in range(2):
        save(run, 2)
        flip(shard(run, 2), -1)
        assert good_step(run) == 1
    names = {"step_00000001", "damaged-step_00000002", "damaged-step_00000002-2"}
    assert set(run.list_dirs("checkpoints")) == names
    save(run, 3, number=1)
    assert set(run.list_dirs("checkpoints")) == {*names, "step_00000003"} - {"step_00000001"}, "retention spares them"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", "7", "\xff", "[" * 9999, '{"schema": 3}', '{"schema": 2}', '{"schema": 2, "files": []}',
     '{"schema": true}', '{"schema": -1}', '{"schema": "3"}'],
)  # fmt: skip
def test_a_manifest_that_is_none_is_set_aside(run: Storage, text: str, caplog: pytest.LogCaptureFixture) -> None:
    save(run, 1)
    save(run, 2)
    (shard(run, 2).parent / "manifest.json").write_text(text, encoding="latin-1")
    assert latest_recipe(run) == RECIPE
    assert good_step(run) == 1
    assert "step_00000002: manifest.json" in caplog.text
    assert run.exists("checkpoints/damaged-step_00000002/manifest.json")


@pytest.mark.parametrize(
    "change",
    [{"files": {}}, {"files": None}, {"files": {"a": 1}}, {"step": 3}, {"step": None}, {"rows": None}, {"recipe": []},
     {"eval_loss": "x"}, {"hooks": None}, {"identity": 1}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_manifest_with_an_odd_value_is_set_aside(run: Storage, change: dict[str, Any], keep: str) -> None:
    save(run, 1, loss=0.5)
    save(run, 2, loss=0.25)
    path = "checkpoints/step_00000002/manifest.json"
    run.write_json(path, seal({**run.read_json(path), **change}))
    save(run, 3, keep=keep)
    if keep == "best":
        assert run.exists("checkpoints/damaged-step_00000002")
        best = Checkpoints(run, DistEnv()).best()
        assert best is not None and best.step == 1
    flip(shard(run, 3), -1)
    assert good_step(run) == 1


def test_the_best_that_is_damaged_gives_way_to_the_next(run: Storage) -> None:
    for step, loss in ((1, 0.3), (2, 0.1), (3, 0.2), (4, 0.9)):
        save(run, step, loss=loss, keep="best", number=9)
    flip(shard(run, 2), -1)
    best = Checkpoints(run, DistEnv()).best()
    assert best is not None and best.step == 3


def test_directories_of_other_names_are_left_alone(run: Storage) -> None:
    save(run, 1)
    folder = shard(run, 1).parent
    strays = ("step_abc", "step_", "step_2", "step_00000002.bak", "step_-0000001", "step_٠٠٠٠٠٠٠٩", "step_000000001")
    for name in strays:
        shutil.copytree(folder, folder.with_name(name))
    assert good_step(run) == 1 and latest_recipe(run) == RECIPE
    save(run, 2, number=1)
    assert set(run.list_dirs("checkpoints")) == {"step_00000002", *strays}


def damage_seen_by_one(where: Path) -> list[int]:
    """What a rank of two falls back to when each shard in turn is damaged: only one rank reads it."""
    dist_env = DistEnv.current(make_recipe())
    run = Storage.open(str(where))
    state = {f"weights.{i}": torch.full((64,), float(i)) for i in range(8)}
    used: list[int] = []
    for number in range(2):
        for step in (1, 2):
            Checkpoints(run, dist_env).save(Manifest(step, {}, RECIPE, None), state, "last", 9)

        def damage(number: int = number) -> None:
            shards = sorted(Path(run.join("checkpoints", "step_00000002")).glob("*.safetensors"))
            assert len(shards) == 2
            flip(shards[number], -1)

        dist_env.on_main(damage)
        manifest = Checkpoints(run, dist_env).latest()
        assert manifest is not None
        used.append(manifest.step)
    return used


def test_all_ranks_fall_back_alike(tmp_path: Path) -> None:
    assert in_processes(damage_seen_by_one, 2, tmp_path, tmp_path / "run") == [[1, 1], [1, 1]]


def test_a_damaged_header_is_an_error_of_the_checkpoint(run: Storage) -> None:
    save(run, 1)
    manifest = latest_manifest(run)
    assert manifest is not None
    path = shard(run, 1)
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError, match="cannot be read into this recipe's model"):
        Checkpoints(run, DistEnv()).load(manifest, zeros())


def test_a_newer_schema_is_refused_with_the_version_that_wrote_it(run: Storage) -> None:
    save(run, 1)
    path = Path(run.join("checkpoints", "step_00000001", "manifest.json"))
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(seal({**raw, "schema": SCHEMA_VERSION + 1, "raymem": "99.0"})))
    with pytest.raises(CheckpointError, match=rf"schema {SCHEMA_VERSION + 1} by raymem 99\.0.*--fresh"):
        latest_manifest(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda wanted: wanted.update({"weights.new": torch.zeros(2)}),
        lambda wanted: wanted.update({"master.a.b": torch.zeros(5, 4)}),
    ],
    ids=["a tensor more", "another shape"],
)
def test_a_checkpoint_of_another_model_is_refused(run: Storage, change: Any) -> None:
    save(run, 1)
    wanted = zeros()
    change(wanted)
    manifest = latest_manifest(run)
    assert manifest is not None
    with pytest.raises(CheckpointError, match=r"step_00000001: cannot be read into this recipe's model"):
        Checkpoints(run, DistEnv()).load(manifest, wanted)


def fill_a_disk(disk: Path) -> str | None:
    """What the checkpoint that does not fit says; None where nothing can be mounted."""
    if not mount_small_disk(disk, "3m"):
        return None
    run = Storage.open(str(disk / "run"))
    checkpoints = Checkpoints(run, DistEnv())
    state = {"weights": torch.arange(500_000, dtype=torch.float32)}
    recipe = make_recipe().to_dict()
    checkpoints.save(Manifest(1, {}, recipe, None), state, "last", 2)
    before = sorted(str(path) for path in disk.rglob("*"))
    with pytest.raises(StorageError) as caught:  # 4 MB do not fit into 3
        checkpoints.save(Manifest(2, {}, recipe, None), state, "last", 2)
    assert sorted(str(path) for path in disk.rglob("*")) == before, "something half-written is left"
    found = {"weights": torch.zeros(500_000)}
    manifest = latest_manifest(run)
    assert manifest is not None
    checkpoints.load(manifest, found)
    assert torch.equal(found["weights"], state["weights"])
    return str(caught.value)


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (message,) = in_processes(fill_a_disk, 0, tmp_path, disk)
    if message is None:
        pytest.skip("this system lets no user mount a small disk")
    assert str(disk / "run" / "checkpoints") in message
    assert "space" in message


class Busy:
    """A file system that does not delete the directories of some checkpoints."""

    def __init__(self, run: Storage, *steps: int) -> None:
        self._whole, self.steps = run.filesystem, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def delete_dir(self, path: str) -> None:
        if path.endswith(tuple(f"step_{step:08d}" for step in self.steps)) and Path(path).exists():
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        self._whole.delete_dir(path)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("raymem")]


def test_an_old_checkpoint_that_cannot_be_deleted_is_named_once_and_deleted_later(
    run: Storage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "is_local", True)  # which it asks of the file system
    busy = Busy(run, 1, 2)
    checkpoints = Checkpoints(Storage(run.path, busy, run.root), DistEnv())
    for step in (1, 2, 3, 4):
        checkpoints.save(Manifest(step, {}, RECIPE, None), tensors(step), "last", 2)
    assert good_step(run) == 4
    assert steps(run) == [1, 2, 3, 4]
    assert not run.exists("checkpoints/step_00000001/manifest.json"), "it cannot be taken for a whole one"
    first, second = said(caplog)
    assert first.startswith("an old checkpoint stays until the next one is saved: storage: cannot delete ")
    assert "step_00000001: [Errno 16]" in first and "step_00000002: [Errno 16]" in second
    busy.steps = ()
    checkpoints.save(Manifest(5, {}, RECIPE, None), tensors(5), "last", 2)
    assert steps(run) == [4, 5]


def test_a_mount_that_is_away_during_a_checkpoint_is_waited_for(
    run: Storage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of the shards, the directory that they are written in, and what is done when they are there."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for place in ("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", "pathlib.Path.mkdir", "os.fsync",
                  "os.rename"):  # fmt: skip
        with monkeypatch.context() as patch:
            fail_thrice(patch, place)
            save(run, 1)
        assert good_step(run) == 1
        began, ended = said(caplog)
        assert "input/output error" in began.lower() and "is back after" in ended, place
        caplog.clear()


def fail_thrice(patch: pytest.MonkeyPatch, place: str) -> None:
    owner, _, name = place.rpartition(".")
    whole = pkgutil.resolve_name(f"{owner.replace('.FileSystem', ':FileSystem').replace('.Path', ':Path')}")
    original, left = getattr(whole, name), iter(range(3))

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*arguments, **options)

    patch.setattr(whole, name, failing)

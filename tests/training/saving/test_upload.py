"""Checkpoints on an object store: training goes on while they are uploaded, and they count once they are whole."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem import stopping
from raymem.errors import NonFiniteError, StorageError, TransientStorageError
from raymem.recipe.schema import Recipe
from raymem.storage.leases.held import holding
from raymem.storage.storage import Storage
from raymem.training import loop
from raymem.training.checkpoint import Checkpoints, latest_manifest
from raymem.training.dist_env import DistEnv
from raymem.training.history import read_history
from raymem.training.manifest import Manifest
from raymem.training.reporter import LocalReporter, Row, Wanted
from raymem.training.saving import background, upload
from raymem.training.step import train_step
from tests.helpers.small_disk import mount_small_disk
from tests.helpers.support import column, in_processes, make_recipe, prepare_split, run_fragment, train

PATIENCE_S = 60.0
RECIPE = make_recipe().to_dict()


class Gate:
    """Holds every upload of shards up until it is opened, and says how many have come."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, self.came = threading.Event(), threading.Event()
        whole = Storage.upload_dir

        def held_up(*arguments: Any, **options: Any) -> Any:
            self.came.set()
            assert self.opened.wait(PATIENCE_S)
            return whole(*arguments, **options)

        patch.setattr(Storage, "upload_dir", held_up)

    def open_soon(self) -> None:
        threading.Timer(0.3, self.opened.set).start()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()
    until(lambda: not uploading())


@pytest.fixture
def run(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The storage of a run; what its uploads need of the local disk lies in a directory of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return Storage.open(s3_uri, retry_for_s=0).child(tmp_path.name)


@pytest.fixture
def recipe(llama: Path, examples: Path, tmp_path: Path) -> Recipe:
    steps = {"name": "run", "train": {"steps": 6, "save_every": 2}}
    return make_recipe(run_fragment(examples, tmp_path), steps, model=llama)


def uploading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "raymem-upload"]


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def whole_steps(run: Storage) -> list[int]:
    names = run.list_dirs("checkpoints")
    return [int(name[5:]) for name in names if run.exists(f"checkpoints/{name}/manifest.json")]


def trained(recipe: Recipe, run: Storage, reporter: Any) -> None:
    loop.run(recipe, DistEnv(), run, prepare_split(recipe, "train"), None, reporter, metered_steps=())


def test_training_goes_on_and_the_next_checkpoint_waits(recipe: Recipe, run: Storage, gate: Gate) -> None:
    rows: list[Row] = []
    whole: dict[float, list[int]] = {}
    disk: list[int] = []
    said: list[str] = []

    def listen(new: Sequence[Row]) -> None:
        rows.extend(new)
        whole[new[-1]["step"]] = whole_steps(run)
        disk.append(sum(path.stat().st_size for path in Path(tempfile.gettempdir()).rglob("*.safetensors")))
        if new[-1]["step"] == 4:
            gate.open_soon()

    trained(recipe, run, LocalReporter(listen, status=said.append))
    assert gate.came.is_set() and whole[3] == whole[4] == [], "steps 3 and 4 were taken while step 2 was uploaded"
    assert whole[5][0] == 2, "step 5 began once that was whole"
    waits = {row["step"]: row["upload_wait_s"] for row in rows if "upload_wait_s" in row}
    assert waits.keys() <= {5.0} and waits[5] > 0
    assert "waiting until the checkpoint of step 2 is uploaded" in said
    assert whole_steps(run) == [4, 6]
    assert [row["step"] for row in read_history(run, 9)] == [1, 2, 3, 4, 5, 6]
    manifest = latest_manifest(run)
    assert manifest is not None and manifest.step == 6 and [row["step"] for row in manifest.rows] == [5, 6]
    one = sum(facts["bytes"] for facts in manifest.files.values())
    assert disk[2:4] == [one, one] and max(disk) == one, "one snapshot at a time"
    assert not list(Path(tempfile.gettempdir()).glob("raymem-tmp-checkpoint*"))
    _, straight = train(recipe)
    assert column(rows) == column(straight)


@pytest.mark.parametrize("kind", [StorageError, TransientStorageError])
def test_an_upload_that_fails_ends_the_run_at_the_next_step(
    kind: type[StorageError], recipe: Recipe, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise kind("storage: cannot write it")

    monkeypatch.setattr(Storage, "upload_dir", fails)
    taken: list[float] = []

    def listen(new: Sequence[Row]) -> None:
        taken.append(new[-1]["step"])
        if len(taken) == 3:
            until(lambda: not uploading())

    with pytest.raises(StorageError, match=r"^storage: cannot write it$") as caught:
        trained(recipe, run, LocalReporter(listen))
    assert type(caught.value) is kind
    assert taken == [1, 2, 3] and whole_steps(run) == []
    assert not list(Path(tempfile.gettempdir()).glob("raymem-tmp-checkpoint*"))


def test_a_run_that_is_stopped_ends_when_its_last_step_is_uploaded(recipe: Recipe, run: Storage, gate: Gate) -> None:
    """The checkpoint of step 2 is under way when step 3 is the last one."""

    def listen(new: Sequence[Row]) -> None:
        if new[-1]["step"] == 3:
            assert whole_steps(run) == []
            stopping.ask()
            gate.open_soon()

    with pytest.raises(stopping.Stopped) as stop:
        trained(recipe, run, LocalReporter(listen))
    assert stop.value.step == 3 and whole_steps(run) == [2, 3]


class Preempted(LocalReporter):
    """Wants a checkpoint of the first step, and notes what is whole when it is told that there is one."""

    def __init__(self, run: Storage, gate: Gate) -> None:
        super().__init__()
        self._run, self._gate, self.whole = run, gate, [-1]

    def wanted(self) -> Wanted:
        if self.whole != [-1]:
            return Wanted.NOTHING
        self._gate.open_soon()
        return Wanted.SAVE

    def saved(self, step: int) -> None:
        self.whole = whole_steps(self._run)


def test_a_checkpoint_that_is_wanted_is_told_of_once_it_is_whole(recipe: Recipe, run: Storage, gate: Gate) -> None:
    reporter = Preempted(run, gate)
    trained(recipe, run, reporter)
    assert reporter.whole == [1]


def test_an_error_in_training_waits_for_the_checkpoint_before(
    recipe: Recipe, run: Storage, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    def listen(new: Sequence[Row]) -> None:
        if new[-1]["step"] == 3:
            gate.open_soon()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained(recipe, run, LocalReporter(listen))
    assert whole_steps(run) == [2]
    assert "training has failed; it ends once the checkpoint of step 2 is uploaded" in caplog.text


def test_what_is_kept_after_a_bad_loss_is_what_was_being_uploaded(
    recipe: Recipe, run: Storage, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, batches: Any, targets: int, updater: Any, number: int, *args: Any, **options: Any) -> Any:
        if number == 2:
            gate.open_soon()
        return train_step(model, batches, math.nan if number == 2 else targets, updater, number, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(NonFiniteError, match="the checkpoint of step 2 is kept"):
        trained(recipe, run, LocalReporter())
    assert whole_steps(run) == [2]


def test_an_interrupt_gives_the_upload_up(
    recipe: Recipe, run: Storage, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written afterwards, and the next session removes what is left and ends as a straight run."""
    monkeypatch.setattr(background, "_LEAVE_S", 0.0)
    rows: list[Row] = []

    def listen(new: Sequence[Row]) -> None:
        if new[-1]["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(recipe, run, LocalReporter(listen))
    gate.opened.set()
    until(lambda: not uploading())
    assert run.list_dirs("checkpoints") == []
    assert not list(Path(tempfile.gettempdir()).glob("raymem-tmp-checkpoint*"))
    run.write_bytes("checkpoints/step_00000004/shard-00001-of-00009.safetensors", b"of another upload")
    trained(recipe, run, LocalReporter(rows.extend))
    assert whole_steps(run) == [4, 6]
    assert column(rows) == column(train(recipe)[1])


def state(value: float) -> dict[str, torch.Tensor]:
    return {"weights.a": torch.full((64,), value)}


def begun(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.start(Manifest(step, {}, RECIPE, None), state(step), "last", 1)


def test_a_lost_lease_stops_the_thread_that_uploads(run: Storage, gate: Gate) -> None:
    class Lost:
        holder, is_lost = "me", False

        def check(self, *, ask: bool = True) -> None:
            if self.is_lost:
                raise StorageError("the lease was taken by another")

    lease, checkpoints = Lost(), Checkpoints(run, DistEnv())
    with holding(run.root, lease):
        begun(checkpoints, 1)
        lease.is_lost = True
        gate.opened.set()
        with pytest.raises(StorageError, match="taken by another"):
            checkpoints.finish()
    assert run.list_dirs("checkpoints") == [] and checkpoints.uploading is None


def killed_before_the_manifest(uri: str, name: str) -> None:
    """Save a step, and die when all files of the next one are there."""
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    run = Storage.open(uri).child(name)
    checkpoints = Checkpoints(run, DistEnv())
    checkpoints.save(Manifest(1, {}, RECIPE, None), state(1), "last", 2)
    upload.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    begun(checkpoints, 2)
    time.sleep(PATIENCE_S)


def test_a_killed_process_leaves_nothing_that_looks_whole(s3_uri: str, run: Storage, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a process died"):
        in_processes(killed_before_the_manifest, 0, tmp_path, s3_uri, tmp_path.name)
    assert len(run.list_dirs("checkpoints")) == 2 and whole_steps(run) == [1]
    checkpoints = Checkpoints(run, DistEnv())
    newest = checkpoints.latest()
    assert newest is not None and newest.step == 1
    checkpoints.clear_unfinished(newest.step)
    assert run.list_dirs("checkpoints") == ["step_00000001"]


def two_ranks(uri: str, name: str, opened: Path) -> dict[str, Any]:
    """What both see while one of them uploads its shards still, and when one of them fails to."""
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    dist_env = DistEnv.current(make_recipe())
    run, whole, fails = Storage.open(uri).child(name), Storage.upload_dir, [False]

    def slow(*arguments: Any, **options: Any) -> Any:
        if fails[0] and dist_env.rank == 1:
            raise StorageError("storage: rank 1 cannot write")
        until(lambda: dist_env.rank == 0 or opened.exists())
        return whole(*arguments, **options)

    Storage.upload_dir = slow  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    tensors = {f"weights.{i}": torch.full((64,), float(i)) for i in range(8)}
    with Checkpoints(run, dist_env) as checkpoints:
        checkpoints.start(Manifest(1, {}, RECIPE, None), tensors, "last", 9)
        if dist_env.rank == 0:
            until(lambda: not uploading())
        for _ in range(3):
            checkpoints.look()
        found["while rank 1 uploads"] = checkpoints.uploading, whole_steps(run)
        dist_env.on_main(opened.touch)
        looks = 0
        while checkpoints.uploading is not None:
            checkpoints.look()
            looks += 1
        found["looks"], found["then"] = looks, whole_steps(run)
        newest = checkpoints.latest()
        found["files"] = None if newest is None else newest.files
        fails[0] = True
        checkpoints.start(Manifest(2, {}, RECIPE, None), tensors, "last", 9)
        try:
            checkpoints.finish()
        except StorageError as error:
            found["error"] = str(error)
        found["in the end"] = checkpoints.uploading, whole_steps(run)
    return found


def test_two_ranks_agree_when_a_checkpoint_is_whole(s3_uri: str, run: Storage, tmp_path: Path) -> None:
    first, second = in_processes(two_ranks, 2, tmp_path / "meet", s3_uri, tmp_path.name, tmp_path / "opened")
    assert first == second, "also after as many looks"
    assert first["while rank 1 uploads"] == (1, [])
    assert first["then"] == [1] and len(first["files"]) == 2
    assert first["error"] == "storage: rank 1 cannot write"
    assert first["in the end"] == (None, [1])


def fill_the_local_disk(disk: Path, uri: str, name: str) -> str | None:
    """What the snapshot that does not fit says; None where nothing can be mounted."""
    if not mount_small_disk(disk, "3m"):
        return None
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    tempfile.tempdir = str(disk)
    run = Storage.open(uri).child(name)
    checkpoints = Checkpoints(run, DistEnv())
    checkpoints.save(Manifest(1, {}, RECIPE, None), {"weights": torch.zeros(500_000)}, "last", 2)
    with pytest.raises(StorageError) as caught:  # 4 MB do not fit into 3
        checkpoints.save(Manifest(2, {}, RECIPE, None), {"weights": torch.zeros(1_000_000)}, "last", 2)
    assert not list(disk.iterdir()), "something half-written is left"
    assert whole_steps(run) == [1]
    return str(caught.value)


def test_a_full_local_disk_names_it_and_the_cure(s3_uri: str, run: Storage, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (message,) = in_processes(fill_the_local_disk, 0, tmp_path, disk, s3_uri, tmp_path.name)
    if message is None:
        pytest.skip("this system lets no user mount a small disk")
    assert message.startswith(f"TMPDIR: cannot write {disk}/raymem-tmp-checkpoint") and "space" in message
    assert "set TMPDIR to a larger disk" in message

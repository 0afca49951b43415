"""A sweep, a run with workers, and LoRAM on two Ray nodes that share only a bucket (moto on loopback).

They are killed and resumed. Nodes and drivers have their own HOME, TMPDIR and working directory each; the results are
those on a local disk, to the bit.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raymem.recipe.load import parse_recipe
from raymem.recipe.schema import Recipe
from raymem.recipe.space_load import recipe_at
from raymem.report.find import find
from raymem.report.sweep_facts import read_sweep
from raymem.runs.loram.pipeline import Pipeline
from raymem.runs.train import launch
from raymem.storage.leases.record import read_record
from raymem.storage.storage import Storage
from raymem.training.history import read_history
from tests.helpers.hosts import Driver, Host
from tests.helpers.loram_runs import files_of, loram_recipe, run_stages
from tests.helpers.ray_processes import QUIET, RayHead, end_session, running_head
from tests.helpers.runs import ray_recipe, train_here
from tests.helpers.support import in_processes

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]
SLOT = {"CPU": 1, "slot": 1}
"""What a worker or a trial takes: each of the two nodes has one such place, and the head none."""
SPACE = {
    "adapter.rank": {"type": "choice", "choices": [2, 4, 8]},
    "optimizer.lr": {"type": "choice", "choices": [1e-2, 1e-3]},
}
SWEEP = {"steps": 12, "global_batch": 8, "micro_batch": 2, "eval_every": 6, "save_every": 3, "warmup": 0}
OPTIONS = ["--budget", "1GiB", "--samples", "6", "--algorithm", "grid", "--no-early-stopping", "--name", "searched"]


@pytest.fixture(scope="module")
def head(s3_uri: str) -> Iterator[RayHead]:
    with running_head() as started:
        yield started


@pytest.fixture(scope="module")
def nodes(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The temporary directories of two nodes with a place each."""
    processes: list[subprocess.Popen[bytes]] = []
    two = [Host(tmp_path_factory.mktemp("node"), name, logins(head)) for name in ("a", "b")]
    try:
        for host in two:
            processes.append(started_node(head, host))
        yield [host.folder / "tmp" for host in two]
    finally:
        for process in processes:
            end_session(process)


def started_node(head: RayHead, host: Host) -> subprocess.Popen[bytes]:
    """Start a node; on a busy machine Ray gives up a first time."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={head.gcs}", "--block"]
    command += ["--num-cpus=1", f"--resources={json.dumps({'slot': 1})}", "--object-store-memory=100000000"]
    environment = {**host.environment, **QUIET}
    del environment["RAY_ADDRESS"]
    log = host.folder / "node.log"
    for _ in range(5):
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "--disable-usage-stats"], env=environment, cwd=host.folder / "work", stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        while process.poll() is None:
            if "Ray runtime started" in log.read_text(errors="replace"):
                return process
            time.sleep(0.2)
    raise AssertionError(log.read_text(errors="replace")[-4000:])


@pytest.fixture
def hosts(head: RayHead, nodes: list[Path], tmp_path: Path) -> Iterator[list[Host]]:
    """Two hosts on which drivers are started."""
    two = [Host(tmp_path, name, logins(head)) for name in ("one", "two")]
    yield two
    for host in two:
        host.close()


def logins(head: RayHead) -> dict[str, str]:
    ours = head.client_env()
    return {name: ours[name] for name in ours if name.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}


def written(recipe: Recipe, storage: str, folder: Path, **data: str) -> str:
    """Write a recipe whose workers or trials take the places of the nodes."""
    plain = recipe.to_dict()
    plain["storage"] |= {"path": storage}
    for split, path in data.items():
        (source,) = plain["data"][split]
        source["path"] = path
    plain["scaling"] |= {"resources_per_worker": SLOT}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(plain))
    return str(file)


def tensors(storage: Storage, name: str, folder: Path) -> bytes:
    target = folder / f"fetched-{uuid.uuid4().hex}"
    storage.download_dir(f"{name}/adapter", target, last="raymem.json")
    return (target / "adapter_model.safetensors").read_bytes()


def trials_of(storage: Storage) -> dict[int, str]:
    """Number of each trial that has ended -> its run."""
    runs = [name for name in storage.list_dirs() if name.startswith("searched-")]
    return {int(name.rpartition("-")[2]): name for name in runs if storage.exists(f"{name}/trial.json")}


def is_refused(driver: Driver, remote: Storage, name: str) -> None:
    record = read_record(remote.read_bytes(f".locks/{name}"))
    assert driver.wait() == 1 and record is not None and record.host == "one"
    assert f"another process is training this run ({record})" in driver.output and "Traceback" not in driver.output


def test_a_sweep_goes_on_from_another_host(
    hosts: list[Host], nodes: list[Path], s3_uri: str, llama: Path, examples: Path, tmp_path: Path
) -> None:
    remote = Storage.open(s3_uri).child(tmp_path.name)
    recipe = ray_recipe(llama, examples, Path("/unused"), "searched", train=SWEEP, space=SPACE)
    file = written(recipe, remote.path, tmp_path)
    first = hosts[0].start(["sweep", file, *OPTIONS])
    first.until(lambda: remote.exists(".locks/searched") and remote.read_bytes(".locks/searched"))
    is_refused(hosts[1].start(["sweep", file, *OPTIONS]), remote, "searched")
    first.until(lambda: trials_of(remote))
    first.process.kill()
    first.wait()
    assert len(trials_of(remote)) < 6, f"it was to be killed:\n{first.output}"
    before = {name: remote.read_bytes(f"{name}/trial.json") for name in trials_of(remote).values()}
    second = hosts[1].start(["sweep", file, *OPTIONS])
    assert second.wait() == 0, second.output[-4000:]
    assert "has expired and is taken over" in second.output
    assert {name: remote.read_bytes(f"{name}/trial.json") for name in before} == before, "none is trained again"
    assert all(list(node.parent.glob("home/cache/data/*")) for node in nodes), "each node trained, from data of its own"
    facts = read_sweep(find(remote.join("searched")))
    assert facts.counts == {"finished": 6} and facts.best is not None
    assert not [name for name in remote.list_dirs("searched") if name not in ("journal", "report")]
    trials = trials_of(remote)
    for row in facts.rows:
        alone = recipe_at(recipe, row.point, "point").to_dict() | {"name": "alone", "scaling": {"num_workers": 0}}
        here = str(tmp_path / f"disk-{row.number}")
        outcome = launch(parse_recipe(alone | {"storage": {"path": here}})).outcome
        assert (row.metrics["loss"], row.metrics["eval_loss"]) == (outcome.loss, outcome.eval_loss)
        assert tensors(remote, trials[row.number], tmp_path) == tensors(Storage.open(here), "alone", tmp_path)


def test_a_run_with_workers_goes_on_from_another_host(
    hosts: list[Host], nodes: list[Path], s3_uri: str, llama: Path, examples: Path, tmp_path: Path
) -> None:
    remote, disk = Storage.open(s3_uri).child(tmp_path.name), Storage.open(str(tmp_path / "disk"))
    steps = 160
    recipe = ray_recipe(llama, examples, Path("/unused"), "run", scaling={"num_workers": 2}, train={"steps": steps})
    remote.upload_dir(examples, "data", last="train.jsonl")
    data = {split: remote.join(f"data/{split}.jsonl") for split in ("train", "eval")}
    file = written(recipe, remote.path, tmp_path, **data)
    first = hosts[0].start(["train", file])
    first.until(lambda: remote.exists("run/checkpoints/step_00000004/manifest.json"))
    first.process.send_signal(signal.SIGSTOP)  # its workers go on, and nobody renews the lease
    second = hosts[1].start(["train", file])
    second.until(lambda: "has expired and is taken over" in second.output)
    taken_at = len(read_history(remote.child("run"), steps))
    first.process.send_signal(signal.SIGCONT)
    first.until(lambda: "the lease on this run was taken by" in first.output and "on two, process" in first.output)
    assert second.wait() == 0, second.output[-4000:]
    assert first.wait() == 1 and "Traceback" not in first.output  # Ray may have kept its workers waiting for places
    assert "resuming from step" in second.output and taken_at < steps, "the first one's workers had done all of it"
    assert not [host for host in hosts if list(host.folder.glob("home/cache/sources"))], "tasks have read the data"
    assert [row["step"] for row in read_history(remote.child("run"), steps)] == list(range(1, steps + 1))
    plain = recipe.to_dict()
    plain["scaling"] |= {"resources_per_worker": None}
    plain["storage"] |= {"path": disk.path}
    in_processes(train_here, 2, tmp_path / "meet", parse_recipe(plain))  # what a worker computes does not depend on Ray
    assert tensors(remote, "run", tmp_path) == tensors(disk, "run", tmp_path)


def test_loram_is_killed_in_every_stage(
    hosts: list[Host], nodes: list[Path], s3_uri: str, llama: Path, examples: Path, tmp_path: Path
) -> None:
    """The full model lies in the bucket, too; each stage goes on from the host whose driver was not killed."""
    remote, disk = Storage.open(s3_uri).child(tmp_path.name), tmp_path / "disk"
    remote.upload_dir(llama, "model", last="config.json")
    plain = loram_recipe(llama, examples, disk).to_dict()
    plain["model"] |= {"name": remote.join("model")}
    plain["train"] |= {"steps": 8}
    run_stages(Pipeline(parse_recipe(plain)))
    plain["storage"] |= {"path": remote.path}
    plain["scaling"] |= {"num_workers": 1, "resources_per_worker": SLOT}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(plain))

    def there(directory: str, *names: str) -> bool:
        """Say whether a directory whose name begins so holds one of the files."""
        above, _, begins = directory.rpartition("/")
        found = [name for name in remote.list_dirs(above) if name.startswith(begins)]
        return any(remote.exists(f"{above}/{name}/{one}".lstrip("/")) for name in found for one in names)

    stages = {
        "prune": lambda: there("cache/loram/", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"),
        "align": lambda: there("loram-aligned-", "checkpoints/step_00000001/manifest.json"),
        "train": lambda: there("small", "checkpoints/step_00000002/manifest.json"),
        "recover": lambda: there("small", "adapter/raymem.json"),
        "verify": lambda: there("small", "recovered/raymem.json"),
        "evaluate": lambda: there("small", "loram/evaluate.json"),
    }
    for number, (stage, began) in enumerate(stages.items()):
        driver = hosts[number % 2].start(["loram", "run", str(file)])
        driver.until(began)
        driver.process.kill()
        assert driver.wait() != 0, f"{stage} was over before it was killed"
    last = hosts[0].start(["loram", "run", str(file)])
    assert last.wait() == 0, last.output[-4000:]
    assert "Traceback" not in last.output and "adapter of the full model: s3://" in last.output
    assert any(list(node.parent.glob("home/cache/models/*")) for node in nodes), "trained from files of its own"
    expected = files_of(disk)
    assert {name: remote.read_bytes(name) for name in expected} == expected
    assert not [name for name in remote.list_dirs("cache/loram") if name.startswith(".")], "nothing is left over"

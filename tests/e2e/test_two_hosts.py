"""Drivers of one run on two hosts that share only a bucket (moto on loopback): one works, and a dead one is replaced.

Leases last five seconds here in place of sixty.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import boto3
import pytest
import yaml

from raymem.recipe.schema import Recipe
from raymem.runs.train import launch
from raymem.storage.leases.record import read_record
from raymem.storage.storage import Storage
from raymem.training.history import read_history
from tests.helpers.faulty_proxy import proxy_before
from tests.helpers.hosts import Driver, Host
from tests.helpers.support import make_recipe, run_fragment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 24
DAY_S = 86400.0


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Their clocks are two days apart."""
    pair = Host(tmp_path, "one", skew_s=DAY_S), Host(tmp_path, "two", skew_s=-DAY_S)
    yield pair
    for host in pair:
        host.close()


def recipe_on(storage: str, llama: Path, examples: Path) -> Recipe:
    train = {"steps": STEPS, "save_every": 3, "schedule": "constant", "warmup": 0}
    places = run_fragment(examples, Path("/unused"))
    changes = {"name": "run", "train": train, "storage": {"path": storage, "retry_for": "5s"}}
    return make_recipe(places, changes, {"adapter": {"dropout": 0.1}}, model=llama)


@pytest.fixture(scope="module")
def undisturbed(llama: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    disk = tmp_path_factory.mktemp("disk")
    launch(recipe_on(str(disk), llama, examples))
    return (disk / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def remote(s3_uri: str, tmp_path: Path) -> Storage:
    return Storage.open(s3_uri, retry_for_s=0).child(tmp_path.name)


@pytest.fixture
def command(remote: Storage, llama: Path, examples: Path, tmp_path: Path) -> list[str]:
    return written(recipe_on(remote.path, llama, examples), tmp_path)


def written(recipe: Recipe, folder: Path) -> list[str]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    return ["train", str(folder / "recipe.yaml")]


def with_a_checkpoint(driver: Driver, remote: Storage) -> None:
    driver.until(lambda: remote.exists("run/checkpoints/step_00000003/manifest.json"))


def check_result(remote: Storage, folder: Path, undisturbed: bytes) -> None:
    remote.download_dir("run/adapter", folder / "fetched", last="raymem.json")
    assert (folder / "fetched" / "adapter_model.safetensors").read_bytes() == undisturbed
    assert [row["step"] for row in read_history(remote.child("run"), STEPS)] == list(range(1, STEPS + 1))
    assert remote.read_bytes(".locks/run") == b""


def test_the_second_is_refused_and_a_dead_ones_lease_expires(
    hosts: tuple[Host, Host], command: list[str], remote: Storage, undisturbed: bytes, tmp_path: Path
) -> None:
    one, two = hosts
    first = one.start(command, delay_s=8.0)
    with_a_checkpoint(first, remote)
    record = read_record(remote.read_bytes(".locks/run"))
    assert record is not None and record.host == "one" and record.pid == first.process.pid
    second = two.start(command)
    assert second.wait() == 1
    assert "run?" in second.output and f"another process is training this run ({record})" in second.output
    assert "choose another name" in second.output and "Traceback" not in second.output
    assert first.process.poll() is None, "which the first one did not notice"
    first.process.kill()
    first.wait()
    third = two.start(command)
    assert third.wait() == 0, third.output
    assert "waiting up to 5 s to see whether it is still there" in third.output
    assert f"the lease of {record} has expired and is taken over" in third.output
    assert "resuming from step" in third.output
    check_result(remote, tmp_path, undisturbed)
    fresh = one.start([*command, "--fresh"])
    assert fresh.wait() == 0, fresh.output
    check_result(remote, tmp_path / "fresh", undisturbed)
    assert remote.exists("run.old-1/adapter/adapter_model.safetensors")


def test_a_driver_that_slept_finds_its_run_taken_and_writes_nothing(
    hosts: tuple[Host, Host], command: list[str], remote: Storage, undisturbed: bytes, tmp_path: Path
) -> None:
    one, two = hosts
    first = one.start(command, delay_s=0.5)
    with_a_checkpoint(first, remote)
    first.process.send_signal(signal.SIGSTOP)
    second = two.start(command, delay_s=0.2)
    second.until(lambda: "resuming from step" in second.output)
    first.process.send_signal(signal.SIGCONT)
    assert first.wait() == 1
    assert "the lease on this run was taken by" in first.output and "on two, process" in first.output
    assert "it writes nothing more" in first.output and "Traceback" not in first.output
    assert second.wait() == 0, second.output
    check_result(remote, tmp_path, undisturbed)


def test_a_bucket_that_goes_away_for_good_ends_the_run_in_a_sentence(
    hosts: tuple[Host, Host], s3_uri: str, llama: Path, examples: Path, tmp_path: Path
) -> None:
    uri = s3_uri.replace("raymem-test", "raymem-leaves")
    address = dict(parse_qsl(urlsplit(uri).query))["endpoint_override"]
    client = boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1")
    client.create_bucket(Bucket="raymem-leaves")
    remote = Storage.open(uri, retry_for_s=0)
    driver = hosts[0].start(written(recipe_on(uri, llama, examples), tmp_path), delay_s=0.5)
    with_a_checkpoint(driver, remote)
    while listed := client.list_objects_v2(Bucket="raymem-leaves").get("Contents"):
        client.delete_objects(Bucket="raymem-leaves", Delete={"Objects": [{"Key": one["Key"]} for one in listed]})
    client.delete_bucket(Bucket="raymem-leaves")
    assert driver.wait() == 1
    assert "create the bucket, or correct its name" in driver.output and "Traceback" not in driver.output


def test_without_permission_nothing_begins(
    hosts: tuple[Host, Host], s3_uri: str, llama: Path, examples: Path, remote: Storage, tmp_path: Path
) -> None:
    with proxy_before(s3_uri) as proxy:
        proxy.errors(status=403)
        driver = hosts[0].start(written(recipe_on(proxy.uri(remote.path), llama, examples), tmp_path))
        assert driver.wait() == 1
        assert "check that the credentials in the environment" in driver.output and "Traceback" not in driver.output
        assert remote.list_dirs() == []

"""raymem doctor: each check can pass and fail; on a real cluster, in processes of their own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymem.cluster.doctor import local
from raymem.cluster.doctor.checks import run_doctor
from raymem.cluster.doctor.local import (
    Check,
    check_auth,
    check_devices,
    check_home,
    check_model,
    check_storage_here,
    check_versions,
    usable_memory_bytes,
)
from raymem.recipe.schema import Recipe
from raymem.versions import WINDOWS
from tests.helpers.ray_processes import RayHead, end_session, free_ports
from tests.helpers.support import save_model


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HOME of our own, and none of the developer's Ray settings."""
    for name in [n for n in os.environ if n.startswith(("RAY_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def recipe(storage: Path, **changes: Any) -> Recipe:
    raw = {
        "name": "r",
        "model": {"name": "demo"},
        "data": {"train": "demo:functions"},
        "train": {"steps": 2},
        "storage": {"path": str(storage)},
    }
    return Recipe.model_validate({**raw, **changes})


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = by_name(check_versions())
    assert set(checks) == {"Python", "torch", "ray", "transformers", "peft", "mlflow"}
    assert all(check.ok for check in checks.values())
    assert checks["torch"].detail == f"{importlib.metadata.version('torch')} (tested: {WINDOWS['torch']})"

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"ray": "2.9.0"}.get(name) or real(name))
    ray = by_name(check_versions())["ray"]
    assert (ray.ok, ray.detail) == (False, "2.9.0 is outside of <3,>=2.51")
    assert ray.cure == "pip install 'ray<3,>=2.51'"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"ray": "2.99.0"}.get(name) or real(name))
    ray = by_name(check_versions())["ray"]
    assert ray.ok is None
    assert ray.detail == f"2.99.0 is newer than what raymem is tested with ({WINDOWS['ray']})"

    def absent(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert by_name(check_versions())["peft"].ok is False

    def no_metadata(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", no_metadata)
    (only,) = check_versions()
    assert only.ok is False
    assert only.cure.startswith("pip install -e .")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    checks = by_name(check_devices(use_gpu=True))
    assert checks["CPU"].detail.startswith(f"{len(os.sched_getaffinity(0))} cores, ")
    assert checks["CPU"].detail.endswith("bf16 works")
    if torch.cuda.device_count() == 0:
        assert checks["GPU"].ok is None
        assert "scaling.use_gpu" in checks["GPU"].detail
        assert "GPU" not in by_name(check_devices(use_gpu=False))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(torch, "ones", refuse)
    assert "does not work (use train.precision: fp32)" in by_name(check_devices(False))["CPU"].detail


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    import torch

    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(local, "_bf16", lambda device: "works")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (79 * gib, 80 * gib))
    gpu = by_name(check_devices(use_gpu=True))["GPU 0"]
    assert (gpu.ok, gpu.detail) == (True, "H100, 80.0 GiB, 79.0 GiB free, bf16 works")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * gib, 80 * gib))
    assert by_name(check_devices(use_gpu=True))["GPU 0"].ok is None


def test_memory_is_positive_and_not_beyond_the_machine() -> None:
    assert 0 < usable_memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_home(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_home().ok is True
    monkeypatch.setenv("HOME", str(private / "absent"))
    check = check_home()
    assert (check.ok, check.detail) == (False, f"{private}/absent: No such file or directory")


def test_storage_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, disk = check_storage_here(str(tmp_path / "new" / "runs"))
    assert storage == Check("storage", True, f"{tmp_path}/new/runs is writable")
    assert disk.name == "disk"
    monkeypatch.setattr(local, "_LITTLE_DISK_BYTES", 1 << 60)
    assert check_storage_here(str(tmp_path))[1].ok is None
    (tmp_path / "file").write_text("")
    (bad,) = check_storage_here(str(tmp_path / "file"))
    assert (bad.ok, bad.detail) == (False, f"cannot create {tmp_path}/file: not a directory")
    assert bad.cure.startswith("a part of the path is a file")


def test_auth(private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "127.0.0.1:6379"
    assert check_auth(None) == [Check("Ray auth", True, "a local Ray gets a token of its own")]
    assert check_auth(head)[0].ok is None  # perhaps the cluster wants none

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (missing,) = check_auth(head)
    assert (missing.ok, missing.detail) == (False, f"no token: {private}/.ray/auth_token does not exist")

    token = tmp_path / "token"
    token.touch(mode=0o644)
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    (loose,) = check_auth(head)
    assert (loose.ok, loose.detail, loose.cure) == (None, f"token in {token}, mode 0644", f"chmod 600 {token}")
    token.chmod(0o600)
    assert check_auth(head) == [Check("Ray auth", True, f"token in {token}, mode 0600")]

    monkeypatch.delenv("RAY_AUTH_MODE")
    assert by_name(check_auth(head))["Ray auth mode"].cure.startswith("export RAY_AUTH_MODE=token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    assert check_auth(None)[0].ok is False
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t0p-secret")
    assert check_auth(None) == [Check("Ray auth", True, "token from RAY_AUTH_TOKEN")]

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert check_auth(None)[0].ok is True
    assert check_auth(head)[0].ok is None
    assert "t0p-secret" not in str(check_auth(head))


def test_doctor_without_cluster(tmp_path: Path) -> None:
    checks = by_name(run_doctor(recipe(tmp_path / "runs")))
    assert {"Python", "CPU", "HOME", "storage", "disk", "Ray auth", "Ray", "tracking"} <= set(checks)
    assert checks["Ray"].detail.endswith("a local Ray will be started")
    assert checks["tracking"].detail == f"{tmp_path}/runs/mlflow.db will be created"
    assert not [check for check in checks.values() if check.ok is False]
    assert "storage" not in by_name(run_doctor())


def test_doctor_looks_at_the_tensors_of_a_model_that_lies_here(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model")

    def found() -> Check:
        return by_name(check_model(recipe(tmp_path / "runs", model={"name": str(directory)})))["model"]

    assert found() == Check("model", True, f"{directory} (llama), every tensor accounted for")
    tensors = load_file(directory / "model.safetensors")
    odd = {**tensors, "lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e5m2)}
    save_file(odd, directory / "model.safetensors", metadata={"format": "pt"})
    assert found().ok is False and "lm_head.weight of dtype F8_E5M2" in found().detail
    assert "base.quantize: nf4" in found().cure
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert found().ok is False and "quant_method awq" in found().detail
    assert by_name(run_doctor(recipe(tmp_path / "runs", model={"name": str(directory)})))["model"] == found()


def test_doctor_finds_everything_that_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    checks = by_name(run_doctor(recipe(tmp_path, tracking={"uri": "http://127.0.0.1:9"})))
    failed = {name: check for name, check in checks.items() if check.ok is False}
    assert set(failed) == {"Ray", "Ray jobs", "tracking"}
    assert "no Ray cluster answers at 127.0.0.1:9" in failed["Ray"].detail
    assert all(check.cure for check in failed.values())


# ---- a real cluster of two nodes, the second of which sees another directory at `unshared`

DOCTOR = """
import dataclasses, json, sys, ray
from raymem.cluster.doctor.checks import check_storage_shared, run_doctor
from raymem.recipe.schema import Recipe
checks = run_doctor(Recipe.model_validate(json.loads(sys.argv[1])))
assert not ray.is_initialized()
nodes = 0
if len(sys.argv) > 2:
    ray.init(log_to_driver=False)
    nodes = check_storage_shared(sys.argv[2])
print("REPORT", json.dumps([nodes, [dataclasses.asdict(check) for check in checks]]))
"""


def doctor(environment: dict[str, str], storage: Path, *then_shared: Path) -> tuple[dict[str, Check], int]:
    """The report on one storage path, and after it the nodes that agree on another one."""
    arguments = [json.dumps(recipe(storage).to_dict()), *map(str, then_shared)]
    done = subprocess.run(
        [sys.executable, "-c", DOCTOR, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stdout + done.stderr
    nodes, checks = json.loads(lines[0].removeprefix("REPORT "))
    return by_name([Check(**fields) for fields in checks]), nodes


@pytest.fixture(scope="module")
def second_node(ray_head: RayHead) -> Iterator[Path]:
    """A second node in a mount namespace of its own; yields the directory that it sees otherwise than the head."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to give a second node its own mounts")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("unshare -m is refused here")
    unshared = ray_head.home / "unshared"
    unshared.mkdir()
    (agent,) = free_ports(1)
    start = f"-m ray.scripts.scripts start --address={ray_head.gcs} --block --disable-usage-stats --num-cpus=1"
    start += f" --node-ip-address=127.0.0.1 --object-store-memory=100000000 --dashboard-agent-listen-port={agent}"
    script = 'mount -t tmpfs tmpfs "$1" && shift && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(unshared), sys.executable, *start.split()]
    with open(ray_head.home / "second.log", "wb") as log:
        process = subprocess.Popen(command, env=ray_head.client_env(), stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_nodes(process, ray_head)
        yield unshared
    finally:
        end_session(process)


def wait_for_nodes(process: subprocess.Popen[bytes], head: RayHead) -> None:
    import urllib.request

    request = urllib.request.Request(head.dashboard + "/nodes?view=summary")
    request.add_header("Authorization", f"Bearer {head.token_path.read_text()}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        nodes = json.load(opener.open(request, timeout=5))["data"]["summary"]
        if sum(node.get("raylet", {}).get("state") == "ALIVE" for node in nodes) == 2:
            return
        time.sleep(0.3)
    pytest.fail((head.home / "second.log").read_text()[-3000:])


@pytest.mark.slow
def test_storage_that_not_every_node_sees(ray_head: RayHead, second_node: Path) -> None:
    shared = ray_head.home / "shared"
    checks, nodes = doctor(ray_head.client_env(), second_node, shared)
    assert checks["storage"].ok is True  # here it works
    assert checks["Ray"].detail.startswith(f"{ray_head.gcs}: 2 nodes, 3 CPU")
    assert checks["Ray jobs"].ok is True
    assert checks["Ray auth"].detail == f"token in {ray_head.token_path}, mode 0600"
    bad = checks["shared storage"]
    assert bad.ok is False
    assert f"{second_node} is not one place for all nodes: node " in bad.detail
    assert bad.detail.endswith("does not see what this machine writes there")
    assert bad.cure.startswith("mount the same directory on every node")
    assert [p.name for p in second_node.iterdir()] == []

    assert nodes == 2
    assert [p.name for p in shared.iterdir()] == []


def test_wrong_token_is_a_line_of_the_report(
    ray_head: RayHead, login: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("not-the-token")
    login(token_path=wrong)
    monkeypatch.setenv("RAY_ADDRESS", ray_head.gcs)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_head.dashboard)
    start = time.monotonic()
    checks = by_name(run_doctor())
    assert time.monotonic() - start < 10  # Ray itself would retry for 20 s
    assert checks["Ray jobs"].ok is False
    assert "refused the token" in checks["Ray jobs"].detail
    assert "RAY_AUTH_MODE=token" in checks["Ray jobs"].cure
    assert (checks["Ray"].ok, checks["Ray"].detail) == (
        False,
        f"{ray_head.gcs}: not tried, its dashboard refused the token",
    )
    assert "not-the-token" not in str(checks)


def test_a_node_that_is_being_drained_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no tasks, so that no worker will see another storage there; every other node has to see this one."""
    import ray

    from raymem.cluster.doctor import checks

    visited: list[str] = []

    class Visit:
        def options(self, scheduling_strategy: Any, **_: Any) -> Visit:
            return self

        def remote(self, *arguments: str) -> tuple[str, ...]:
            return arguments

    def get(arguments: tuple[str, str, str, str], timeout: float) -> str | None:
        if arguments[3] == leaving:
            raise ray.exceptions.TaskUnschedulableError("the node is infeasible")
        visited.append(arguments[3])
        return checks._visit(*arguments)

    here, leaving, other = (28 * letter for letter in ("aa", "bb", "cc"))
    nodes = [{"NodeID": name, "NodeManagerAddress": "10.0.0.1", "Alive": True} for name in (here, leaving, other)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: here))
    monkeypatch.setattr(ray, "remote", lambda function: Visit())
    monkeypatch.setattr(ray, "get", get)
    checks.check_storage_shared(str(tmp_path / "runs"))
    assert visited == [here, other] and not list((tmp_path / "runs").iterdir())

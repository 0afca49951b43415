"""A rendered RayJob without Kubernetes: what its Pods would run, as processes on loopback.

A head that takes no work and two workers with the flags, environment and token of the manifests, the MLflow server with
its Deployment's arguments, and the entrypoint through the job server, as KubeRay's submitter sends it. What differs is
addresses, and that /shared and /etc/raymem lie in a temporary directory. Once with this interpreter, and once with a
clean virtual environment that is made by the install steps of the Dockerfile.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from raymem.k8s import checks, render
from tests.helpers.ray_processes import RayHead, clean_environment, end_session, free_ports, wait_until_up
from tests.helpers.runs import ray_recipe

ROOT = Path(__file__).parents[2]
STEPS = 200
TOKEN = "rehearsal-" + os.urandom(16).hex()

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the PATH"),
]


@dataclass(frozen=True)
class Image:
    """What stands for the container image."""

    path: str
    """PATH that finds its python, ray and mlflow."""
    workdir: Path
    extra: dict[str, str]


@pytest.fixture(params=["this interpreter", "steps of the Dockerfile"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    app = tmp_path / "app"
    if request.param == "this interpreter":
        app.mkdir()
        shutil.copytree(ROOT / "jobs", app / "jobs")
        return Image(f"{Path(sys.executable).parent}:/usr/bin:/bin", app, {"PYTHONPATH": str(ROOT)})
    return replay_dockerfile(tmp_path / "image", app)


def replay_dockerfile(folder: Path, app: Path) -> Image:
    """Its COPY and ``pip install`` lines, word for word, with the default build arguments (CPU, no extras)."""
    build, venv = folder / "build", folder / "venv"
    build.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    path = f"{venv}/bin:/usr/bin:/bin"
    environment = {k: v for k, v in clean_environment().items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": path, "TORCH": "cpu", "EXTRAS": ""}
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for line in (ROOT / "k8s" / "Dockerfile").read_text().splitlines():
        if copied := re.fullmatch(r"COPY (.*) (\S+)", line):
            for name in copied[1].split():
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, build / copied[2], ignore=ignore)
                else:
                    shutil.copy(ROOT / name, build / copied[2])
        elif line.startswith("RUN ") and "pip install" in line:
            command = ["bash", "-c", line.removeprefix("RUN ")]
            done = subprocess.run(command, cwd=build, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, line + done.stdout[-3000:] + done.stderr[-3000:]
    app.mkdir()
    shutil.copytree(build / "jobs", app / "jobs")
    shutil.rmtree(build)
    recipe = app / "jobs" / "recipes" / "demo.yaml"  # the package brings the manifests along
    render = f"raymem k8s render {recipe} --overlay cpu-demo --worker-memory 1Gi --set storage.path=/shared/runs"
    done = subprocess.run(["bash", "-c", render], cwd=app, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kind: RayJob" in done.stdout
    return Image(path, app, {})


@dataclass(frozen=True)
class Pods:
    """What the manifests say about the Pods, with addresses and directories of this machine."""

    entrypoint: str
    head_flags: list[str]
    worker_flags: list[str]
    mlflow_command: list[str]
    environment: dict[str, str]


def manifests(recipe: Path, tmp_path: Path, tracking: str) -> Pods:
    """Render the recipe, put its ConfigMap where the entrypoint looks, and read the rest."""
    rendered = render.render(recipe, overlay="cpu-demo", workers="2", cpus=1, worker_memory="1Gi")
    found = list(yaml.safe_load_all(rendered.manifests))
    (job,) = [d for d in found if d["kind"] == "RayJob"]
    (server,) = [d for d in found if d["kind"] == "Deployment"]
    settings = {d["metadata"]["name"]: d["data"] for d in found if d["kind"] == "ConfigMap"}
    Path(render.RECIPE_FILE).parent.mkdir(exist_ok=True)
    Path(render.RECIPE_FILE).write_text(settings["rehearsal-recipe"]["recipe.yaml"])
    (mlflow,) = server["spec"]["template"]["spec"]["containers"]
    port = tracking.rpartition(":")[2]
    here = {"--port=5000": f"--port={port}", "--host=0.0.0.0": "--host=127.0.0.1"}
    arguments = [here.get(a, a).replace("/mlflow/", f"{tmp_path}/mlflow/") for a in mlflow["args"]]
    environment = {
        name: value.replace("/shared/", f"{checks.MOUNT}/")
        for name, value in {**settings["raymem-settings"], "MLFLOW_TRACKING_URI": tracking}.items()
    }
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    (group,) = cluster["workerGroupSpecs"]
    cpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]  # KubeRay makes num-cpus of it
    return Pods(
        job["spec"]["entrypoint"],
        [f"--{k}={v}" for k, v in cluster["headGroupSpec"]["rayStartParams"].items()],
        [f"--{k}={v}" for k, v in {"num-cpus": cpus, **group["rayStartParams"]}.items()],
        [*mlflow["command"], *arguments],
        environment | {e["name"]: e["value"] for e in mlflow["env"]},
    )


class Attempt:
    """One cluster, as the operator makes one for each attempt of a RayJob."""

    def __init__(self, image: Image, pods: Pods, home: Path) -> None:
        self.image, self.pods, self.home = image, pods, home
        self.processes: list[subprocess.Popen[bytes]] = []
        gcs, dashboard = free_ports(2)
        home.mkdir(mode=0o700)
        token = home / "token"
        token.touch(mode=0o600)
        token.write_text(TOKEN)
        self.head = RayHead(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", token, home, 0)
        # What the operator adds to the environment of the manifests.
        added = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ADDRESS": self.head.gcs}
        kept = {k: os.environ[k] for k in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE") if k in os.environ}
        self.environment = {**kept, **image.extra, **pods.environment, **added, "PATH": image.path, "HOME": str(home)}

    def start(self) -> None:
        port, dashboard = self.head.gcs.rpartition(":")[2], self.head.dashboard.rpartition(":")[2]
        (client,) = free_ports(1)
        flags = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
        flags += [f"--temp-dir={self.home}/r", f"--ray-client-server-port={client}"]
        self._node("head", ["--head", *flags, *self.pods.head_flags])
        wait_until_up(self.processes[0], self.head, self.home / "head.log")
        for number in (1, 2):
            self._node(f"worker-{number}", [f"--address={self.head.gcs}", *self.pods.worker_flags])
            # One after the other: on one machine they share a directory of sockets, which Ray numbers without a lock.
            wait_for(functools.partial(self._has_nodes, number + 1), self.output, self.processes[-1])

    def _has_nodes(self, count: int) -> bool:
        request = urllib.request.Request(f"{self.head.dashboard}/nodes?view=summary")
        request.add_header("Authorization", f"Bearer {TOKEN}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), opener.open(request, timeout=5) as response:
            nodes = json.load(response)["data"]["summary"]
            return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in nodes) == count
        return False

    def _node(self, name: str, flags: list[str]) -> None:
        (agent,) = free_ports(1)
        flags = [*flags, "--block", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}"]
        self.processes.append(self.spawn(["ray", "start", *flags], self.home / f"{name}.log"))

    def spawn(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        with open(log, "wb") as file:
            program = shutil.which(command[0], path=self.image.path)
            assert program is not None
            return subprocess.Popen(
                [program, *command[1:]], env=self.environment, cwd=self.image.workdir, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    def submit(self) -> subprocess.Popen[bytes]:
        """The submitter's command line, through a shell as in its Pod."""
        command = f"ray job submit --address {self.head.dashboard} --submission-id rehearsal -- {self.pods.entrypoint}"
        return self.spawn(["bash", "-c", command], self.home / "submitter.log")

    def output(self) -> str:
        """What the submitter printed and, before it, what the nodes did."""
        logs = sorted(self.home.glob("*.log"))
        return "\n".join(f"---- {log.name}\n{log.read_text()}" for log in logs)

    def die(self) -> None:
        """The nodes are gone from one moment to the next."""
        for process in self.processes:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait(15)

    def end(self) -> None:
        for process in reversed(self.processes):
            end_session(process)


@pytest.fixture
def home() -> Iterator[Path]:
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))  # short, for unix sockets
    yield path
    shutil.rmtree(path, ignore_errors=True)


def answer(address: str, **headers: str) -> int:
    """Status of a GET request."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(address, headers=headers), timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def wait_for(condition: Callable[[], Any], explain: Callable[[], str], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 400  # a shared machine
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, explain()
        time.sleep(0.05)


def test_a_rendered_job(
    image: Image, home: Path, tmp_path: Path, llama: Path, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    monkeypatch.setattr(checks, "MOUNT", str(shared))
    monkeypatch.setattr(render, "RECIPE_FILE", str(tmp_path / "etc" / "recipe.yaml"))
    shutil.copytree(llama, shared / "model")
    shutil.copytree(examples, shared / "data", ignore=shutil.ignore_patterns("cache"))
    steps = {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "eval_every": 100, "save_every": 4, "warmup": 0}
    tracked = {"kind": "mlflow", "experiment": "rehearsal", "register_as": "rehearsal"}
    wanted = ray_recipe(
        shared / "model", shared / "data", shared / "runs", "rehearsal", train=steps, tracking=tracked,
        scaling={"num_workers": 2, "resources_per_worker": None},
    )  # fmt: skip
    (tmp_path / "rehearsal.yaml").write_text(yaml.safe_dump(wanted.to_dict()))
    (tmp_path / "mlflow").mkdir()
    (port,) = free_ports(1)
    tracking = f"http://127.0.0.1:{port}"
    pods = manifests(tmp_path / "rehearsal.yaml", tmp_path, tracking)

    first, second = Attempt(image, pods, home / "1"), Attempt(image, pods, home / "2")
    server = first.spawn(pods.mlflow_command, home / "mlflow.log")
    try:
        wait_for(lambda: answer(f"{tracking}/health") == 200, (home / "mlflow.log").read_text, server)
        check_mlflow_hosts(tracking)

        first.start()
        check_tokens(first.head)
        submitter = first.submit()
        checkpoints = shared / "runs/rehearsal/checkpoints"
        wait_for(lambda: list(checkpoints.glob("step_*/manifest.json")), first.output, submitter)
        assert submitter.poll() is None, first.output()
        first.die()
        end_session(submitter)

        second.start()  # backoffLimit: another cluster, the same entrypoint
        assert second.submit().wait(300) == 0, second.output()
        (resumed,) = re.findall(rf"trained {STEPS} steps \(resumed at (\d+)\)", second.output())
        assert 0 < int(resumed) < STEPS
        assert TOKEN not in first.output() + second.output()
        assert (shared / "runs/rehearsal/adapter/adapter_model.safetensors").is_file()
        check_tracked(tracking, tmp_path)
    finally:
        second.end()
        first.end()
        end_session(server)


def check_tokens(head: RayHead) -> None:
    jobs = f"{head.dashboard}/api/jobs/"
    assert answer(jobs) == 401
    assert answer(jobs, Authorization="Bearer wrong") == 403
    assert answer(jobs, Authorization=f"Bearer {TOKEN}") == 200


def check_mlflow_hosts(tracking: str) -> None:
    """The name that the Ray Pods use is let in, and one that a web page could bring is not."""
    page = f"{tracking}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert answer(page, Host="raymem-mlflow:5000") == 200
    assert answer(page, Host="localhost:5000") == 200
    assert answer(page, Host="evil.example:5000") == 403


def check_tracked(tracking: str, folder: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking)
    experiment = client.get_experiment_by_name("rehearsal")
    (run,) = client.search_runs([experiment.experiment_id])  # one run, although it took two attempts
    assert run.info.status == "FINISHED"
    history = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(set(history)) == list(range(1, STEPS + 1))
    downloaded = Path(client.download_artifacts(run.info.run_id, "adapter", str(folder)))
    assert (downloaded / "adapter_model.safetensors").is_file()
    assert client.get_model_version_by_alias("rehearsal", "candidate").run_id == run.info.run_id

"""A Ray cluster of several nodes on this machine, each in a session of its own, so that a node can die alone."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.ray_processes import QUIET, RayHead, end_session, running_head

OF_RAY = {"_AutoscalingCoordinatorActor"}
"""Actors that Ray keeps for all drivers."""
NODES = 2
"""Nodes beside the head; each has a slot for one worker."""


class Cluster:
    """A head, and nodes with one slot for a worker each. This process is one of its drivers, to ask about its state."""

    def __init__(self, head: RayHead) -> None:
        self.head = head
        self.temporary = head.home / "tmp"
        self._nodes: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What a session needs to be a driver."""
        ours = self.head.client_env()
        return {key: ours[key] for key in ours if key.startswith("RAY_") or key == "HOME"}

    def join(self) -> None:
        """Make this process a driver and start the nodes."""
        import ray

        from tests.helpers.ray_fixtures import read_authentication_again

        os.environ.update({k: v for k, v in self.environment.items() if k != "HOME"})
        read_authentication_again()
        ray.init(address=self.head.gcs, log_to_driver=False, logging_level="ERROR")
        self.fill_up()

    def fill_up(self) -> None:
        """Start nodes until there are as many as there should be, and wait for them."""
        import ray

        deadline = time.monotonic() + 600  # on a busy machine
        while time.monotonic() < deadline:
            self._nodes = [node for node in self._nodes if node.poll() is None]
            while len(self._nodes) < NODES:
                self._nodes.append(self._start())
            alive = [node for node in ray.nodes() if node["Alive"] and "slot" in node["Resources"]]
            if len(alive) == NODES:
                return
            time.sleep(0.2)
        raise AssertionError(f"{NODES} nodes did not come up: {ray.nodes()}")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self.head.gcs}", "--block"]
        command += ["--num-cpus=1", f"--resources={json.dumps({'slot': 1})}", "--object-store-memory=100000000"]
        command += ["--disable-usage-stats"]
        environment = {**self.head.client_env(), **QUIET, **worker_environment(self.temporary)}
        environment.pop("RAY_ADDRESS")
        with open(self.head.home / "node.log", "ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def workers(self) -> list[psutil.Process]:
        """Processes of Ray Train workers, oldest first."""
        found = []
        for root in (self.head.pid, *(node.pid for node in self._nodes if node.poll() is None)):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(root).children(recursive=True)
        workers = []
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    workers.append(process)
        return sorted(workers, key=lambda process: process.create_time())

    def busy_nodes(self) -> list[subprocess.Popen[bytes]]:
        """Nodes on which a worker runs."""
        workers = {process.pid for process in self.workers()}
        busy = []
        for node in self._nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if workers & {child.pid for child in psutil.Process(node.pid).children(recursive=True)}:
                    busy.append(node)
        return busy

    def drain(self, node: subprocess.Popen[bytes], notice_s: float) -> bool:
        """Tell the cluster that a node will be taken away; False if it declines."""
        from ray.core.generated import autoscaler_pb2

        raylet: Any = importlib.import_module("ray._raylet")
        for process in psutil.Process(node.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                for argument in process.cmdline():
                    if argument.startswith("--node_id="):
                        deadline_ms = int((time.time() + notice_s) * 1000)
                        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
                        client = raylet.GcsClient(address=self.head.gcs)
                        name = argument.partition("=")[2]
                        accepted, _ = client.drain_node(name, reason, "taken back", deadline_ms)
                        return bool(accepted)
        return False

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL to everything on a node."""
        end_session(node)

    def leftovers(self) -> list[str]:
        """Placement groups and actors of other drivers that are still there, in words."""
        import ray
        from ray.util import placement_group_table

        groups = [f"placement group {key}" for key, value in placement_group_table().items()
                  if value["state"] != "REMOVED"]  # fmt: skip
        actors = [f"actor {value['ActorClassName']} {value['State']}" for value in ray._private.state.actors().values()
                  if value["State"] != "DEAD" and value["ActorClassName"] not in OF_RAY]  # fmt: skip
        return groups + actors + [f"worker process {process.pid}" for process in self.workers()]

    def close(self) -> None:
        import ray

        ray.shutdown()
        for node in self._nodes:
            end_session(node)


def worker_environment(temporary: Path) -> dict[str, str]:
    temporary.mkdir(exist_ok=True)
    root = str(Path(__file__).parents[2])
    return {"TMPDIR": str(temporary), "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}  # fmt: skip


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster that ends with the block."""
    # The head's own folder is not known before it starts.
    temporary = Path(tempfile.mkdtemp(prefix="rm-tmp-", dir="/tmp"))
    with running_head(**worker_environment(temporary)) as head:
        cluster = Cluster(head)
        cluster.temporary = temporary
        try:
            cluster.join()
            yield cluster
        finally:
            cluster.close()


def signal_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to processes that may be gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)

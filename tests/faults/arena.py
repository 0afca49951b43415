"""What all rounds of a soak share: model and data, servers, the cluster, and the results of undisturbed runs."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raymem.recipe.load import parse_recipe
from raymem.storage.storage import Storage
from raymem.testing.processes import in_processes, start_server
from raymem.testing.tiny import save_tiny_model, write_examples
from tests.faults.cases import NAME, Case
from tests.faults.nodes import Cluster
from tests.faults.sessions import PRELOADED, Session, Spec
from tests.helpers.ray_processes import free_ports
from tests.helpers.runs import train_here

NEW_MOUNTS = 0x00020000  # of unshare(2)
BUCKET = "faults"


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run leaves."""

    digest: str
    losses: dict[int, float]
    file_uses: int
    """Uses of files of a session from start to end; 0 where nobody counted."""
    seconds: float
    """How long it took; 0 if it ran in another way than the rounds do."""


@dataclass
class Arena:
    """The shared ground of rounds."""

    folder: Path
    can_mount: bool = False
    """Whether this process has mounts of its own."""
    has_cluster: bool = False
    """Whether there are rounds on Ray, for which somebody starts the cluster."""
    cluster: Cluster | None = None
    bucket: str | None = None
    """``host:port`` of the object store."""
    tracking: Any = None
    """The MLflow server."""
    _references: dict[str, Reference] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def examples(self) -> Path:
        return self.folder / "examples"

    def build(self) -> None:
        """Make model and data, unless an earlier soak of this folder has."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        if not (self.model / "config.json").exists():
            save_tiny_model(self.model)
        for file in self.model.iterdir():
            file.chmod(0o644)  # two users read it
        self.examples.mkdir(exist_ok=True)
        write_examples(self.examples / "train.jsonl", 40, seed=0)
        write_examples(self.examples / "eval.jsonl", 8, seed=1)

    def environment(self, folder: Path, case: Case) -> dict[str, str]:
        """Environment of a round's sessions."""
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        ours = {
            "TMPDIR": str(temporary),
            "RAYMEM_CACHE": str(self.folder / "cache"),  # what models were once asked
            "HF_HUB_OFFLINE": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "COLUMNS": "300",
        }
        return ours | (self.cluster.environment if case.workers and self.cluster else {})

    def reference(self, case: Case) -> Reference:
        """What the case leaves when nothing happens to it; made once."""
        with self._lock:
            if case.key not in self._references:
                kept = self.folder / "references" / f"{case.key}.json"
                if not kept.exists():
                    self._make_reference(case, kept)
                raw = json.loads(kept.read_text())
                raw["losses"] = {int(step): loss for step, loss in raw["losses"].items()}
                self._references[case.key] = Reference(**raw)
            return self._references[case.key]

    def _make_reference(self, case: Case, kept: Path) -> None:
        folder = kept.parent / case.key
        shutil.rmtree(folder, ignore_errors=True)
        storage = folder / "storage"
        storage.mkdir(parents=True)
        alone = Case(case.method, 0, case.strategy)
        uses, seconds = 0, 0.0
        if case.workers == 2:  # the same loop in a plain gloo group: what a worker computes does not depend on Ray
            recipe = case.recipe(self.model, self.examples, str(storage))
            recipe["scaling"].pop("resources_per_worker")
            in_processes(train_here, 2, folder / "meet", parse_recipe(recipe))
        else:
            recipe = alone.recipe(self.model, self.examples, str(storage))
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            spec = Spec(
                (*case.command, str(folder / "recipe.yaml")), self.environment(folder, alone), folder / "log", folder
            )
            session = Session(spec)
            assert session.wait(120) and session.status == 0, f"the undisturbed run failed: {session.output}"
            assert session.ended is not None
            uses, seconds = session.file_uses, session.ended - session.began
        raw = {
            "digest": digest_of(Storage.open(str(storage)), case),
            "losses": losses_of(storage / NAME),
            "file_uses": uses,
            "seconds": seconds,
        }
        kept.write_text(json.dumps(raw))
        shutil.rmtree(folder)


def digest_of(storage: Storage, case: Case, name: str = NAME) -> str:
    """SHA-256 over all tensors that a run leaves for its user. Raises LookupError where there are none."""
    run = storage.child(name)
    folders = ("adapter", "recovered") if case.is_staged else ("adapter", "model")
    digest, num_files = hashlib.sha256(), 0
    for folder in folders:
        for name in sorted(run.sizes(folder)):
            if name.endswith(".safetensors"):
                digest.update(run.read_bytes(f"{folder}/{name}"))
                num_files += 1
    if not num_files:
        raise LookupError(f"{run.path} has no result")
    return digest.hexdigest()


def losses_of(run: Path) -> dict[int, float]:
    """Loss of each step; of a step that is told twice the last."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    return {int(row["step"]): row["loss"] for row in rows if "loss" in row}


def unmount_below(folder: Path) -> None:
    """Unmount whatever is mounted in a folder, the newest first."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        place = line.split()[1]
        if place.startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", place], check=False)


def take_own_mounts() -> bool:
    """Give this process, which has one thread, mounts of its own; False where the system refuses."""
    if os.geteuid() or ctypes.CDLL(None).unshare(NEW_MOUNTS):
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], check=False, capture_output=True).returncode == 0


@contextlib.contextmanager
def open_arena(
    folder: Path | None, *, with_cluster: bool, with_bucket: bool, with_tracking: bool, own_mounts: bool
) -> Iterator[Arena]:
    """Start what rounds need. Everything ends with the block."""
    can_mount = own_mounts and take_own_mounts()
    start_server(PRELOADED)
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="raymem-faults-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        arena = Arena(folder.resolve(), can_mount, with_cluster)
        arena.build()
        if with_bucket:
            arena.bucket = stack.enter_context(_running_bucket())
        if with_tracking:
            arena.tracking = stack.enter_context(_running_tracking(arena.folder / "tracking"))
        yield arena


@contextlib.contextmanager
def _running_bucket() -> Iterator[str]:
    from pyarrow import fs

    (port,) = free_ports(1)
    # In a process of its own: the sessions of several rounds wait for it.
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            assert server.poll() is None and time.monotonic() < deadline, "moto's server did not start"
            time.sleep(0.2)
        fs.FileSystem.from_uri(f"s3://{BUCKET}?{options}")[0].create_dir(BUCKET)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def _running_tracking(folder: Path) -> Iterator[Any]:
    from tests.helpers.tracking import Server

    folder.mkdir(exist_ok=True)
    database = f"sqlite:///{folder}/m.db"
    names = {
        "_MLFLOW_SERVER_FILE_STORE": database,
        "_MLFLOW_SERVER_REGISTRY_STORE": database,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    os.environ.update(names)
    server = Server()
    try:
        yield server
    finally:
        server.close()

"""Throughput of training with a checkpoint every 20 steps on a slow bucket, on the local disk, and without any.

The bucket is moto's behind a proxy that waits 200 ms before each answer and lets 20 MB/s through. The model is trained
whole, so that a checkpoint has three times its weights: 88 MB, of which the upload takes less than 20 steps do. The
runs take turns of 20 steps, each with one checkpoint at its beginning; a turn ends with no upload under way, so that
none goes on while another run has its turn. What raymem did before, waiting for each upload, is a run of its own.

Times are given as CPU time of the training thread, which is what throughput loses where a core is free for the upload;
as CPU time of the whole process, its uploading thread included, which is what it loses where none is; and by the clock,
where all processes of the machine count: among them moto and the proxy, whose own CPU time is named apart.

    python benchmarks/slow_bucket.py [--rounds 5]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.helpers

import provenance
import psutil
import torch
from turns import Contestant, spread

from raymem.recipe.load import load_recipe, packaged_recipe
from raymem.runs.train import launch
from raymem.training.checkpoint import Checkpoints
from raymem.training.data.demo import DemoPaths, ensure_demo
from raymem.training.reporter import Row
from raymem.training.saving.upload import Uploads

EVERY = 20
DELAY_S, BYTES_PER_S = 0.2, 20e6
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
FIGURES = ("thread_cpu_s", "cpu_s", "wall_s", "blocked_s", "upload_s", "server_cpu_s")
KINDS = ("none", "disk", "bucket", "bucket, waiting")


def serve() -> None:
    """Be the bucket: say where it is, and stay until the parent closes standard input."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    from tests.helpers.faulty_proxy import proxy_before

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    fs.FileSystem.from_uri(f"s3://runs?{options}&allow_bucket_creation=true")[0].create_dir("runs")
    with proxy_before(f"s3://runs?{options}") as proxy:
        print(proxy.uri(f"s3://runs?{options}"), flush=True)
        sys.stdin.readline()  # what is prepared once need not be slow
        proxy.slow(DELAY_S, bytes_per_s=BYTES_PER_S)
        print("slow", flush=True)
        sys.stdin.read()


class Turns:
    """Measures turns of a run from its listener, in which the run stands still between two of them."""

    def __init__(self) -> None:
        self.blocked_s = self.upload_s = 0.0
        self.bytes = 0

    def watch(self) -> None:
        """Measure how long checkpoints hold training up, and how long uploads take."""
        turns, start, look, finish = self, Checkpoints.start, Checkpoints.look, Checkpoints.finish
        upload = Uploads.start

        def timed(method: Any) -> Any:
            def call(*arguments: Any) -> Any:
                began = time.perf_counter()
                try:
                    return method(*arguments)
                finally:
                    turns.blocked_s += time.perf_counter() - began

            return call

        def uploaded(uploads: Any, manifest: Any, shards: Any, record: Any, retain: Any) -> None:
            began = time.perf_counter()
            turns.bytes = sum(path.stat().st_size for path in Path(shards.name).iterdir())

            def retained() -> None:
                retain()
                turns.upload_s = time.perf_counter() - began

            upload(uploads, manifest, shards, record, retained)

        def waiting(checkpoints: Any, *arguments: Any) -> None:
            start(checkpoints, *arguments)
            finish(checkpoints)

        Checkpoints.start = timed(waiting if "waiting" in sys.argv[2] else start)  # type: ignore[method-assign]
        Checkpoints.look = timed(look)  # type: ignore[method-assign]
        Uploads.start = uploaded  # type: ignore[method-assign]

    def listen(self, rows: Sequence[Row]) -> None:
        if rows[-1]["step"] % EVERY != EVERY - 1:
            return
        answer: dict[str, Any] = {}
        if rows[-1]["step"] > EVERY:
            uploading = [thread for thread in threading.enumerate() if thread.name == "raymem-upload"]
            assert not uploading, f"the upload takes longer than {EVERY} steps; take a larger model"
            answer = {
                "wall_s": time.perf_counter() - self.began,
                "thread_cpu_s": time.thread_time() - self.thread_cpu_began,
                "cpu_s": time.process_time() - self.cpu_began,
                "blocked_s": self.blocked_s,
                "upload_s": self.upload_s,
                "bytes": self.bytes,
            }
        print(json.dumps(answer), file=ANSWERS, flush=True)
        sys.stdin.readline()
        self.blocked_s, self.upload_s = 0.0, 0.0
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        self.thread_cpu_began = time.thread_time()


ANSWERS = os.fdopen(os.dup(1), "w")
"""Standard output; what libraries print goes elsewhere."""


def train(kind: str, storage: str, demo: str) -> None:
    os.dup2(2, 1)
    torch.set_num_threads(1)
    turns = Turns()
    turns.watch()
    every = 10**6 if kind == "none" else EVERY
    overrides = [
        f"storage.path={storage}", "name=run", f"train.save_every={every}", "train.steps=1000000", "tracking=none",
        "scaling.num_workers=0", "train.schedule=constant", f"model.tokenizer={DemoPaths(Path(demo)).tokenizer}",
        f"data.train={{path: {DemoPaths(Path(demo)).corpus('text', 'train')}, max_rows: 2000}}",
    ]  # fmt: skip
    launch(load_recipe(packaged_recipe("pretrain"), overrides), listeners=[turns.listen])


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve()
        return
    if sys.argv[1:2] == ["--train"]:
        train(*sys.argv[2:5])
        return
    parser = provenance.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    environment = {**os.environ, **CREDENTIALS, "OMP_NUM_THREADS": "1"}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with (
        tempfile.TemporaryDirectory(prefix="raymem-slow-bucket-") as folder,
        subprocess.Popen(
            [sys.executable, __file__, "--serve"], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as server,
    ):  # fmt: skip
        assert server.stdout is not None and server.stdin is not None
        bucket = server.stdout.readline().strip()
        demo = str(ensure_demo(Path(folder)).directory)
        contestants: dict[str, Contestant] = {}
        try:

            def start(kind: str) -> None:
                name = kind.replace(", ", "-")
                storage = bucket.replace("runs?", f"runs/{name}?") if "bucket" in kind else f"{folder}/{name}"
                contestants[kind] = Contestant(__file__, "--train", kind, storage, demo, environment=environment)

            with ThreadPoolExecutor() as together:
                list(together.map(start, KINDS))
            server.stdin.write("\n")
            server.stdin.flush()
            assert server.stdout.readline() == "slow\n"
            for number in range(rounds):
                for kind in [*KINDS[number % len(KINDS) :], *KINDS[: number % len(KINDS)]]:
                    before = cpu_s(server.pid)
                    answer = contestants[kind].ask(None)
                    found[kind].append({**answer, "server_cpu_s": cpu_s(server.pid) - before})
                    print(kind, found[kind][-1], file=sys.stderr, flush=True)
                provenance.save("slow_bucket", {**figures(found), "turns": found})
        finally:
            for contestant in contestants.values():
                contestant.end()
            server.stdin.close()


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def figures(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Compare each kind with the run without checkpoints, round by round."""

    def over(kind: str, other: str, what: str) -> dict[str, float]:
        return spread([mine[what] / its[what] for mine, its in zip(found[kind], found[other], strict=True)])

    def median(kind: str, what: str) -> float:
        return statistics.median(turn[what] for turn in found[kind])

    rows = [
        {
            "kind": kind,
            "thread_cpu_over_none": over(kind, "none", "thread_cpu_s"),
            "cpu_over_none": over(kind, "none", "cpu_s"),
            "wall_over_none": over(kind, "none", "wall_s"),
            **{what: median(kind, what) for what in FIGURES},
            "blocked_share": spread([turn["blocked_s"] / turn["wall_s"] for turn in found[kind]]),
            "bytes": found[kind][0]["bytes"],
        }
        for kind in KINDS
    ]
    return {
        "rows": rows,
        "bucket_over_disk": {what: over("bucket", "disk", what) for what in ("thread_cpu_s", "cpu_s", "wall_s")},
        "steps_per_turn": EVERY,
        "bucket": {"delay_s": DELAY_S, "bytes_per_s": BYTES_PER_S},
        "model": "demo (6.3M parameters), trained whole with AdamW, 4 rows of 256 tokens, fp32, one thread",
    }


if __name__ == "__main__":
    main()

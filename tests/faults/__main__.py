"""Soaks raymem in faults: ``python -m tests.faults --rounds 200 --seed 0``.

Rounds are told in a JSONL file beside the runs; the same command goes on after the last one that is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import queue
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.arena import Arena, open_arena
from tests.faults.nodes import running_cluster
from tests.faults.report import read_records, write_report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.faults.fault import Fault

CLUSTERS = 5
"""Clusters that are started one after the other; on a busy machine Ray itself may fail to start."""


def main() -> int:
    """Returns the exit status: 1 if a round failed."""
    from tests.faults.kinds import KINDS

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each has the next one")
    parser.add_argument("--jobs", type=int, default=2, help="rounds at a time; of those on Ray there is one at a time")
    parser.add_argument("--kinds", nargs="*", choices=sorted(KINDS), help="only these faults")
    parser.add_argument("--work", type=Path, default=Path("/tmp/raymem-faults"), help="folder of the runs")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="no rounds on Ray")
    where.add_argument("--on-ray", action="store_true", help="of these seeds, only the rounds on Ray")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    asked = parser.parse_args()
    # Read by the libraries of every process that is started below; one BLAS thread makes sums repeatable.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    kinds = {name: KINDS[name] for name in asked.kinds or KINDS}
    records = asked.work / "rounds.jsonl"
    seeds = range(asked.seed, asked.seed + asked.rounds)
    with open_arena(
        asked.work, with_cluster=not asked.local, with_bucket=True, with_tracking=True, own_mounts=True
    ) as arena:
        if not arena.can_mount:
            print("no mounts of its own: faults of mounted storage are left out", flush=True)
        done = {raw["seed"] for raw in read_records(records)}
        _soak([seed for seed in seeds if seed not in done], kinds, arena, asked, records)
    ours = [raw for raw in read_records(records) if raw["seed"] in seeds]
    print(Counter(raw["outcome"] for raw in ours))
    if asked.report:
        asked.report.write_text(write_report(ours, _facts()))
    return int(any(raw["outcome"] == "failed" for raw in ours))


def _soak(
    seeds: list[int], kinds: Mapping[str, type[Fault]], arena: Arena, asked: argparse.Namespace, records: Path
) -> None:
    """Play rounds in threads: one for those on Ray, the others for those of one process."""
    from tests.faults.rounds import draw_round, run_round

    local: queue.SimpleQueue[int] = queue.SimpleQueue()
    on_ray: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in seeds:
        try:
            case, _, _ = draw_round(seed, kinds, arena)
        except LookupError as error:
            print(f"{seed}: left out: {error}", flush=True)
            continue
        if case.workers:
            on_ray.put(seed)
        elif not asked.on_ray:
            local.put(seed)
    lock = threading.Lock()

    def play(waiting: queue.SimpleQueue[int], *, again: bool = False) -> None:
        while not waiting.empty():
            seed = waiting.get()
            case, fault, _ = draw_round(seed, kinds, arena)
            began = time.monotonic()
            try:
                record = {**dataclasses.asdict(run_round(seed, case, fault, arena)), "commit": _commit()}
            except Exception:
                print(f"{seed}: the harness itself failed:\n{traceback.format_exc()}", flush=True)
                if again:
                    waiting.put(seed)
                    raise
                continue
            with lock, records.open("a") as file:
                file.write(json.dumps(record) + "\n")
            seconds = time.monotonic() - began
            print(
                f"{seed} {record['outcome']:9} {record['kind']}: {record['case']}, {record['moment']}, "
                f"{len(record['sessions'])} sessions, {seconds:.1f} s {record['detail']} "
                f"{'; '.join(record['problems'])}",
                flush=True,
            )

    def play_on_ray() -> None:
        for _ in range(CLUSTERS):
            if on_ray.empty():
                return
            try:
                with running_cluster() as arena.cluster:
                    play(on_ray, again=True)
            except (Exception, pytest.fail.Exception) as error:
                print(f"the cluster is started again: {error}", flush=True)

    if asked.jobs == 1:
        play(local)
        play_on_ray()
        return
    threads = [threading.Thread(target=play_on_ray, daemon=True)]
    threads += [threading.Thread(target=play, args=(local,), daemon=True) for _ in range(asked.jobs - 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _facts() -> dict[str, str]:
    import ray
    import torch
    import transformers

    from raymem import __version__

    return {
        "command": f"`python -m tests.faults {shlex.join(sys.argv[1:])}`",
        "date": datetime.date.today().isoformat(),
        "versions": f"raymem {__version__}, torch {torch.__version__}, ray {ray.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
    }


if __name__ == "__main__":
    sys.exit(main())

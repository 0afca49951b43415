"""Throughput of one Ray worker, with reporting and checkpoints on, against the same step in a bare loop.

The two take turns of a few seconds: while the bare loop works, every process of the Ray run is stopped (SIGSTOP), so
the machine's drift falls on both sides alike. Start-up is excluded and reported.

    python benchmarks/ray_overhead.py [--steps 240] [--threads 1]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import provenance
import psutil
import torch

from raymem.cli.console import hush_libraries
from raymem.cluster.train import controller
from raymem.recipe.load import load_recipe, packaged_recipe
from raymem.recipe.schema import Recipe
from raymem.runs.prepare import prepare_split
from raymem.runs.resolve import resolve
from raymem.runs.train import launch
from raymem.training.data.batches import global_targets, rank_batches
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.sampler import Sampler
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater
from raymem.training.step import train_step

WARM_UP = 5
"""Steps left out on both sides; they include the two that raymem meters."""
TURN_S = 15.0


def bare_loop(recipe: Recipe) -> Iterator[float]:
    """Seconds of each step: load rows, train_step, nothing else."""
    rows = PackedRows(prepare_split(resolve(recipe), "train").directories)
    sampler = Sampler(recipe.seed, rows.sizes_and_weights, recipe.train.global_batch)
    model = build_model(recipe)
    updater = build_updater(model, recipe)
    for step in itertools.count():
        began = time.perf_counter()
        ids = sampler.ids(step)
        batches = rank_batches(rows, ids, 0, 1, recipe.train.micro_batch)
        train_step(model, batches, global_targets(rows, ids), updater, step, recipe.optimizer.lr, clip_norm=1.0)
        yield time.perf_counter() - began


@contextlib.contextmanager
def stopped(run: psutil.Process) -> Iterator[None]:
    """Stop a process and all its descendants (the whole private Ray cluster) for a while."""
    family = [run, *run.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in reversed(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def take_turns(recipe: Recipe, overrides: list[str]) -> tuple[list[float], list[float], float]:
    """Seconds per step of the bare loop and under Ray, and of Ray's start-up.

    Under Ray a step lasts from the end of the one before to its own end, whatever happens in between; only the steps
    in which the run was stopped, and the next ones, when all of Ray's timers go off at once, are left out.
    """
    metrics = Path(recipe.storage.path) / recipe.name / "metrics.jsonl"
    bare = bare_loop(recipe)
    for _ in range(WARM_UP):
        next(bare)
    seconds, began = [], time.perf_counter()
    with subprocess.Popen([sys.executable, __file__, "--under-ray", *overrides]) as process:
        run = psutil.Process(process.pid)
        while not metrics.exists() or metrics.stat().st_size == 0:
            time.sleep(0.2)
            assert process.poll() is None, "the run under Ray ended before its first report"
        start_up = time.perf_counter() - began
        while process.poll() is None:
            with stopped(run):
                until = time.perf_counter() + TURN_S
                while time.perf_counter() < until:
                    seconds.append(next(bare))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TURN_S)
        assert process.returncode == 0, f"the run under Ray ended with {process.returncode}"
    elapsed = [json.loads(line)["elapsed_s"] for line in metrics.read_text().splitlines()]
    under_ray = [after - before for before, after in itertools.pairwise(elapsed)][WARM_UP - 1 :]
    assert int(threads_file(recipe).read_text()) == torch.get_num_threads()
    calm = [step for before, step in itertools.pairwise(under_ray) if max(before, step) < TURN_S]
    return seconds, calm, start_up


def train_under_ray(overrides: list[str]) -> None:
    """The run itself, in a process of its own; its worker leaves the number of its threads in a file."""
    recipe = load_recipe(packaged_recipe("demo"), overrides)
    worker, path = controller.train_worker, threads_file(recipe)

    def noting_threads(config: Any) -> Any:
        outcome = worker(config)
        path.write_text(str(torch.get_num_threads()))
        return outcome

    controller.train_worker = noting_threads
    launch(recipe)


def threads_file(recipe: Recipe) -> Path:
    return Path(recipe.storage.path) / f"{recipe.name}.threads"


def compare(folder: str, steps: int, threads: int) -> dict[str, Any]:
    """One run under Ray of that many steps and threads, beside as many seconds of the bare loop."""
    torch.set_num_threads(threads)
    overrides = [
        "data.eval=null", "train.eval_every=null", f"train.steps={steps + WARM_UP}", "train.save_every=50",
        f"storage.path={folder}", f"name=overhead-{threads}-{os.getpid()}",
        "scaling.num_workers=1", f"scaling.resources_per_worker={{CPU: {threads}}}",
    ]  # fmt: skip
    in_this_process = [*overrides, "scaling.num_workers=0"]
    recipe = resolve(load_recipe(packaged_recipe("demo"), in_this_process), build_demo=launch).recipe
    bare, under_ray, start_up = take_turns(recipe, overrides)
    return {
        "threads": threads,
        "steps": {"bare": len(bare), "ray": len(under_ray)},
        "s_per_step": {"bare": statistics.mean(bare), "ray": statistics.mean(under_ray)},
        "medians_s_per_step": {"bare": statistics.median(bare), "ray": statistics.median(under_ray)},
        "ray_over_bare": statistics.median(under_ray) / statistics.median(bare),
        "ray_over_bare_of_means": statistics.mean(under_ray) / statistics.mean(bare),
        "start_up_s": start_up,
        "checkpoints": steps // 50,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()])
    parser.add_argument("--under-ray", nargs="+", metavar="PATH=VALUE", help=argparse.SUPPRESS)
    parser.add_argument("--storage", help="where the demo model is kept; by default it is built anew")
    arguments = parser.parse_args()
    hush_libraries()
    if arguments.under_ray:
        train_under_ray(arguments.under_ray)
        return
    with contextlib.ExitStack() as stack:
        folder = arguments.storage or stack.enter_context(tempfile.TemporaryDirectory(prefix="raymem-overhead-"))
        rows = [compare(folder, arguments.steps, threads) for threads in arguments.threads]
    model = "demo (6.3M parameters), LoRA r16, 4 rows of 256 tokens, fp32"
    provenance.save("ray_overhead", {"rows": rows, "model": model})


if __name__ == "__main__":
    main()

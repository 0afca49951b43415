"""Throughput of one Ray worker, with reporting and checkpoints on, against the same step in a bare loop.

Bare, Ray, bare again: the machine's drift falls on both sides. Start-up is excluded and reported.

    python benchmarks/ray_overhead.py [--steps 200]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import provenance
import torch

from raymem.cluster import data, demo, ray_train
from raymem.cluster.trainer import launch
from raymem.console import hush_libraries
from raymem.training.data.batches import global_targets, rank_batches
from raymem.training.data.dataset import PackedRows
from raymem.training.data.sampler import Sampler
from raymem.training.model import build_model
from raymem.training.optim import build_updater
from raymem.training.recipe import Recipe
from raymem.training.recipe_io import load_recipe, packaged_recipe
from raymem.training.step import train_step
from raymem.training.storage import Storage

WARM_UP = 5
"""Steps left out on both sides; they include the two that raymem meters."""


def bare_loop(recipe: Recipe, steps: int) -> list[float]:
    """Seconds of each step: load rows, train_step, nothing else."""
    prepared = data.prepare_split(recipe, "train", data.shared_tokenizer(recipe, storage(recipe)), storage(recipe),
                                  on_ray=False)  # fmt: skip
    rows = PackedRows(prepared.directories)
    sampler = Sampler(recipe.seed, rows.sizes_and_weights, recipe.train.global_batch)
    model = build_model(recipe)
    updater = build_updater(model, recipe)
    seconds = []
    for step in range(steps + WARM_UP):
        began = time.perf_counter()
        ids = sampler.ids(step)
        batches = rank_batches(rows, ids, 0, 1, recipe.train.micro_batch)
        train_step(model, batches, global_targets(rows, ids), updater, step, recipe.optimizer.lr, clip_norm=1.0)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def ray_run(recipe: Recipe) -> tuple[list[float], float]:
    """Seconds between the ends of consecutive steps (all reports and checkpoints included), and of the start-up."""
    began = time.perf_counter()
    ray_train.train_worker = noting_threads(ray_train.train_worker, threads_file(recipe))
    launch(recipe)
    whole = time.perf_counter() - began
    lines = (Path(recipe.storage.path) / recipe.name / "metrics.jsonl").read_text().splitlines()
    elapsed = [json.loads(line)["elapsed_s"] for line in lines]
    steps = [after - before for before, after in itertools.pairwise(elapsed)][WARM_UP - 1 :]
    return steps, whole - sum(steps)


def storage(recipe: Recipe) -> Storage:
    return Storage.open(recipe.storage.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    hush_libraries()
    with tempfile.TemporaryDirectory(prefix="raymem-overhead-") as folder:
        sections = ["data.eval=null", "train.eval_every=null", f"train.steps={steps + WARM_UP}", "train.save_every=50"]
        sections += [f"storage.path={folder}", "scaling.num_workers=1"]
        recipe = load_recipe(packaged_recipe("quickstart"), sections)
        recipe = demo.resolve(recipe, storage(recipe), build=launch)
        first = bare_loop(recipe, steps // 2)
        under_ray, start_up = ray_run(recipe)
        second = bare_loop(recipe, steps // 2)
        threads_ray = int(threads_file(recipe).read_text())
    figures: dict[str, Any] = {
        "threads_bare": torch.get_num_threads(),
        "threads_ray": threads_ray,
        "steps": len(under_ray),
        "bare_s_per_step": {"before": statistics.mean(first), "after": statistics.mean(second)},
        "ray_s_per_step": statistics.mean(under_ray),
        "medians_s_per_step": {"bare": statistics.median(first + second), "ray": statistics.median(under_ray)},
        "ray_over_bare": statistics.mean(under_ray) / statistics.mean(first + second),
        "start_up_s": start_up,
        "checkpoints": len(under_ray) // 50,
        "model": "demo (6.3M parameters), LoRA r16, 4 rows of 256 tokens, fp32",
    }
    assert figures["threads_bare"] == figures["threads_ray"], figures
    provenance.save("ray_overhead", figures)


def threads_file(recipe: Recipe) -> Path:
    return Path(recipe.storage.path) / "threads"


def noting_threads(worker: Callable[[Any], Any], path: Path) -> Callable[[Any], Any]:
    """The worker's entry point, leaving the number of threads that it trained with in a file."""

    def noting(config: Any) -> Any:
        import torch

        outcome = worker(config)
        path.write_text(str(torch.get_num_threads()))
        return outcome

    return noting


if __name__ == "__main__":
    main()

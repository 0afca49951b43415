"""Cosine between compressed and exact gradients, layer by layer, while a demo model trains with LoRA.

The trajectory is that of uncompressed training; every few steps each variant computes the gradient of the same batch.
It also tells how much of the error comes from the input of the first layer alone, and what the best factors of that
rank would give (truncated singular value decompositions). The goal is a cosine of at least 0.98
in every layer at rank n/8. Writes the figures as JSON and the course over training as a picture.

    python benchmarks/loract_gradients.py [--model demo-long] [--steps 200] [--every 20]
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import provenance
import torch
from torch import nn

from raymem.cli.console import hush_libraries
from raymem.linalg import LowRank
from raymem.methods.loract import compress_activations, packer
from raymem.recipe.load import load_recipe, packaged_recipe
from raymem.runs.prepare import prepare_split
from raymem.runs.resolve import resolve
from raymem.runs.train import launch
from raymem.training.data.batches import Batch, global_targets, rank_batches
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.sampler import Sampler
from raymem.training.loss import forward_loss_sum
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater
from raymem.training.step import train_step

VARIANTS: dict[str, dict[str, Any]] = {
    f"{scope} n/{part}{'' if first == 'raw' else ', all compressed'}": {
        "scope": scope, "rank": 1 / part, "first_input": first,
    }
    for scope in ("layer", "sublayer", "linear") for part in (4, 8, 32) for first in ("raw", "compressed")
}  # fmt: skip
BEST = ", best factors"
VARIANTS |= {f"{name}{BEST}": VARIANTS[name] for name in ("layer n/8", "sublayer n/8")}


def best_factors(matrix_TN: torch.Tensor, rank: int, *_: object) -> LowRank:
    """In the place of LoRAct's decomposition: no factors of this rank are nearer."""
    with torch.no_grad():
        left_TK, values_K, right_KN = torch.linalg.svd(matrix_TN, full_matrices=False)
        kept = min(rank, *matrix_TN.shape)
        return LowRank(left_TK[:, :kept] * values_K[:kept], right_KN[:kept])


def gradient(model: nn.Module, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """All gradients of each layer as one vector, in fp64."""
    model.zero_grad()
    for batch in batches:
        forward_loss_sum(model, batch, mixed=False).backward()
    parts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and parameter.grad is not None:
            parts.setdefault(layer[1], []).append(parameter.grad.flatten().double())
    model.zero_grad()
    return {layer: torch.cat(vectors) for layer, vectors in parts.items()}


def compare(model: nn.Module, batches: list[Batch], step: int) -> dict[str, dict[str, float]]:
    """Variant -> cosine per layer, and the relative error of the whole gradient."""
    exact, found = gradient(model, batches), {}
    energy = sum(float(vector.square().sum()) for vector in exact.values())
    for name, options in VARIANTS.items():
        decompose = best_factors if name.endswith(BEST) else packer.factorise
        with mock.patch.object(packer, "factorise", decompose), compress_activations(model, **options) as handle:
            handle.begin_step(step)
            ours = gradient(model, batches)
        missed = sum(float((ours[layer] - vector).square().sum()) for layer, vector in exact.items())
        cosines = {n: float(torch.cosine_similarity(ours[n], vector, dim=0)) for n, vector in exact.items()}
        found[name] = {**cosines, "relative_error": (missed / energy) ** 0.5}
    return found


def plot(course: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, options in VARIANTS.items():
        lowest = [min(v for k, v in row[name].items() if k != "relative_error") for row in course.values()]
        style = {
            "color": {"layer": "tab:blue", "sublayer": "tab:orange", "linear": "tab:green"}[options["scope"]],
            "marker": {4: "o", 8: "s", 32: "^"}[round(1 / options["rank"])],
            "linestyle": ":" if name.endswith(BEST) else "-" if options["first_input"] == "raw" else "--",
        }
        axes.plot(list(course), [1 - value for value in lowest], label=name, markersize=4, **style)
    axes.axhline(0.02, color="black", linestyle=":", label="goal")
    axes.set(xlabel="step", ylabel="1 - cosine with the exact gradient, worst layer", yscale="log")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = provenance.parser(__doc__, base="demo-long", steps=200)
    parser.add_argument("--every", type=int, default=20)
    arguments = parser.parse_args()
    hush_libraries()
    recipe = load_recipe(
        packaged_recipe("demo"),
        [
            f"model.name={arguments.model}",
            f"storage.path={arguments.storage}",
            "scaling.num_workers=0",
            "tracking=none",
        ],
    )
    run = resolve(recipe, build_demo=launch)
    recipe, rows = run.recipe, PackedRows(prepare_split(run, "train").directories)
    sampler = Sampler(recipe.seed, rows.sizes_and_weights, recipe.train.global_batch)
    model = build_model(recipe)
    updater = build_updater(model, recipe)
    course: dict[int, dict[str, dict[str, float]]] = {}
    for step in range(arguments.steps + 1):
        ids = sampler.ids(step)
        batches = rank_batches(rows, ids, 0, 1, recipe.train.micro_batch)
        # LoRA's B is zero at step 0, so that half of the gradients are too.
        if step % arguments.every == 0 and (step or not arguments.every < arguments.steps):
            course[step] = compare(model, batches, step)
            print(step, {name: round(row["relative_error"], 4) for name, row in course[step].items()}, flush=True)
        train_step(model, batches, global_targets(rows, ids), updater, step, recipe.optimizer.lr, clip_norm=1.0)
    lowest = {
        name: min(value for row in course.values() for key, value in row[name].items() if key != "relative_error")
        for name in VARIANTS
    }
    provenance.save(
        "loract_gradients",
        {
            "model": arguments.model, "adapter": "LoRA r16", "batch": "4 x 256", "goal": 0.98,
            "goal_met": {name: lowest[name] >= 0.98 for name in ("layer n/8", "sublayer n/8")},
            "lowest_cosine": lowest, "by_step": course,
        },
    )  # fmt: skip
    plot(course, provenance.RESULTS / "loract_gradients.png")


if __name__ == "__main__":
    main()

"""LoRAM on the demo task: evaluation loss of the pruned and the full model, without and with the recovered adapter.

Over ratios and criteria, against the same adapter trained on the full model, on a dense model of equal bytes that was
pre-trained like the base, and scattered into wrong units (the negative control). Every row keeps the first and the last
layer, whose share of an adapter needs no recovery; so right and wrong units are also compared without that share.
Resumable: a row that stands in ``results/parts`` is not repeated.

    python benchmarks/make_base.py --model demo-long --storage raymem-runs   # once
    python benchmarks/loram_quality.py [--steps 200] [--seeds 0 1] [--dense-ratios 0.25 0.5] [--part 0/2]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import provenance
import torch

from raymem.cli.console import hush_libraries
from raymem.methods.loram.coupling import couple
from raymem.methods.loram.index_map import place
from raymem.methods.loram.manifest import MANIFEST, Manifest
from raymem.methods.loram.recover import FACTOR_KEY, WEIGHTS, recover_factor
from raymem.recipe.axes import full_base
from raymem.recipe.load import load_recipe, packaged_recipe, parse_recipe
from raymem.recipe.schema import Recipe
from raymem.runs import demo
from raymem.runs.evaluate import evaluate_recipe
from raymem.runs.loram.pipeline import Pipeline, PrunedBase
from raymem.runs.train import launch
from raymem.seeds import generator
from raymem.storage.checksums import CHECKSUMS
from raymem.storage.safetensors_io import read_header, read_tensor, save_tensors
from raymem.storage.storage import Storage

RATIOS = (0.25, 0.5, 0.65, 0.85)
ROWS: list[tuple[str, float, bool]] = [
    *((criterion, ratio, False) for ratio in RATIOS for criterion in ("random", "taylor")),
    ("wanda", 0.5, False),
    ("taylor", 0.5, True),
    ("taylor", 0.85, True),
]
"""Criterion, ratio, aligned."""


def recipe_for(options: argparse.Namespace, seed: int, *overrides: str) -> Recipe:
    fixed = [f"model.name={options.model}", f"storage.path={options.storage.resolve()}", "scaling.num_workers=0"]
    run = [
        f"seed={seed}",
        f"train.steps={options.steps}",
        f"train.eval_every={options.steps}",
        f"optimizer.lr={options.lr}",
    ]
    settings = [*fixed, *run, f"train.save_every={options.steps}", "tracking=none", *overrides]
    return load_recipe(packaged_recipe("loram"), settings)


def loss(recipe: Recipe, artifact: str | Path) -> float:
    return evaluate_recipe(recipe, str(artifact)).result.loss


def loram_row(options: argparse.Namespace, criterion: str, ratio: float, aligned: bool, seed: int) -> dict[str, Any]:
    """One pruned model, from pruning to the negative control."""
    pipeline = pipeline_for(options, criterion, ratio, aligned, seed)
    pipeline.prune()
    pipeline.align()
    outcome = pipeline.train()
    recovered = pipeline.recover()
    pipeline.verify()
    base = pipeline.ready()
    full = base.run.recipe.model_copy(update={"base": full_base()})
    wrong = scattered_wrongly(Path(outcome["artifact"]), recovered, base, seed)
    return {
        "pruned_bytes": 4 * base.plan.pruned.parameters,
        "paper_reduction": base.plan.paper_reduction,
        "peak_bytes": outcome["peak_bytes"],
        "pruned": loss(base.run.recipe, "base"),
        "pruned + adapter": loss(base.run.recipe, outcome["artifact"]),
        "full + recovered": loss(full, recovered),
        "full + wrong units": loss(full, wrong),
    }


def control_row(
    options: argparse.Namespace, criterion: str, ratio: float, aligned: bool, seed: int
) -> dict[str, Any]:  # fmt: skip
    """The negative control again, on the pruned layers' share of a finished row's adapters alone."""
    base = pipeline_for(options, criterion, ratio, aligned, seed).ready()
    full = base.run.recipe.model_copy(update={"base": full_base()})
    run = Path(options.storage.resolve(), base.run.recipe.name)
    return {
        "pruned layers": loss(full, of_pruned_layers(run / "recovered", base)),
        "pruned layers, wrong units": loss(full, of_pruned_layers(run / "wrong-units", base)),
    }


def pipeline_for(options: argparse.Namespace, criterion: str, ratio: float, aligned: bool, seed: int) -> Pipeline:
    name = f"quality-{options.steps}-{label(criterion, ratio, aligned, seed)}"
    overrides = [f"name={name}", f"base.criterion={criterion}", f"base.ratio={ratio}", f"base.seed={seed}"]
    if aligned:
        train = f"{{steps: {options.align_steps}, global_batch: 4, micro_batch: 4, warmup: 0.1}}"
        corpus = "{train: 'demo:text', sequence_length: 256, packing: wrapped}"
        overrides.append(f"base.align={{data: {corpus}, train: {train}, optimizer: {{lr: {options.align_lr}}}}}")
    return Pipeline(recipe_for(options, seed, *overrides), status=lambda text: None)


def of_pruned_layers(adapter: Path, base: PrunedBase) -> Path:
    """A copy of an adapter of the full model that does nothing in layers that were not pruned."""
    layers = re.compile(rf"{re.escape(couple(base.source.config()).layers)}\.(\d+)\.")
    target = adapter.with_name(f"{adapter.name}-pruned-layers")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(adapter, target, ignore=shutil.ignore_patterns(MANIFEST, CHECKSUMS))
    tensors = {}
    for key, entry in read_header(adapter, WEIGHTS)[1].items():
        found = layers.search(key)
        pruned = found is not None and int(found[1]) in base.manifest.kept
        tensor = read_tensor(adapter, entry)
        tensors[key] = tensor if pruned else torch.zeros_like(tensor)
    save_tensors(target / WEIGHTS, tensors)
    return target


def scattered_wrongly(adapter: Path, recovered: Path, base: PrunedBase, seed: int) -> Path:
    """The trained adapter in the full model's coordinates, at units that were drawn by chance."""
    coupling = couple(base.source.config())
    sizes = {group.name: group.num_units for group in coupling.groups}
    kept = {
        layer: {
            group: torch.randperm(sizes[group], generator=generator(seed, "wrong", layer, group))[: len(units)].tolist()
            for group, units in groups.items()
        }
        for layer, groups in base.manifest.kept.items()
    }
    wrong: Manifest = dataclasses.replace(base.manifest, kept=kept)
    target = recovered.with_name("wrong-units")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(recovered, target, ignore=shutil.ignore_patterns(MANIFEST, CHECKSUMS))
    tensors = {}
    for key, entry in read_header(adapter, WEIGHTS)[1].items():
        match = FACTOR_KEY.fullmatch(key)
        assert match is not None
        where = place(coupling, wrong.kept, match["module"])
        axis = where.columns if match["factor"] == "A" else where.rows
        tensors[key] = recover_factor(read_tensor(adapter, entry), match["factor"], axis)
    save_tensors(target / WEIGHTS, tensors)
    return target


def full_row(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The full model untouched, and with the adapter that is trained on it."""
    recipe = recipe_for(options, seed, "base={kind: full}", f"name=quality-{options.steps}-full-{seed}")
    finished = launch(recipe, status=lambda text: None)
    adapted = loss(recipe, finished.outcome.artifact)
    return {"full": loss(recipe, "base"), "full + lora": adapted, "peak_bytes": finished.outcome.peak_bytes}


def dense_row(options: argparse.Namespace, ratio: float, seed: int) -> dict[str, Any]:
    """The adapter on a dense model of at least as many bytes as the pruned one, pre-trained like the base."""
    storage = Storage.open(str(options.storage.resolve()))
    recipe = recipe_for(options, seed, f"base.ratio={ratio}", "base.criterion=random", "base.seed=0")
    raw = demo.pretraining_recipe(options.model, storage).to_dict()
    layers, neurons = dense_sizes(raw["model"]["config"], Pipeline(recipe, status=lambda text: None).prune())
    raw["model"]["config"] |= {"num_hidden_layers": layers, "intermediate_size": neurons}
    raw["train"]["steps"] = options.dense_steps or raw["train"]["steps"]
    raw["name"] = f"dense-{layers}-{neurons}-{raw['train']['steps']}"
    pretraining = parse_recipe(raw)
    if demo.finished_model(pretraining) is None:
        launch(pretraining, status=lambda text: None)
        demo.discard_checkpoints(pretraining)
    directory = demo.finished_model(pretraining)
    name = f"quality-{options.steps}-dense-{ratio}-{seed}"
    tuned = recipe_for(options, seed, "base={kind: full}", f"name={name}", f"model.name={directory}")
    finished = launch(tuned, status=lambda text: None)
    return {
        "layers": layers, "neurons": neurons, "dense": loss(tuned, "base"),
        "dense + lora": loss(tuned, finished.outcome.artifact), "peak_bytes": finished.outcome.peak_bytes,
    }  # fmt: skip


def dense_sizes(config: dict[str, Any], pruned: PrunedBase) -> tuple[int, int]:
    """Layers and neurons of the dense model: as few layers as can hold the bytes, then as few neurons."""
    hidden, neurons = config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    attention = 2 * hidden * hidden * (1 + groups / heads)
    others = config["vocab_size"] * hidden + hidden
    needed = pruned.plan.pruned.parameters - others
    layers = math.ceil(needed / (attention + 3 * hidden * neurons + 2 * hidden))
    wanted = (needed / layers - attention - 2 * hidden) / (3 * hidden)
    return layers, min(neurons, 8 * math.ceil(wanted / 8))


def table(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per row of which every seed is there, means over the seeds."""
    lines = []
    for criterion, ratio, aligned in ROWS:
        rows = [found.get(label(criterion, ratio, aligned, seed)) for seed in options.seeds]
        fulls = [found.get(f"full-{seed}") for seed in options.seeds]
        if not all([*rows, *fulls]):
            continue
        line: dict[str, Any] = {"criterion": criterion, "ratio": ratio, "aligned": aligned}
        for column, where in [(c, rows) for c in rows[0] or {}] + [(c, fulls) for c in ("full", "full + lora")]:
            line[column] = round(statistics.mean(row[column] for row in where if row), 4)
        line["full + lora peak_bytes"] = round(statistics.mean(row["peak_bytes"] for row in fulls if row))
        controls = [found.get(f"control-{label(criterion, ratio, aligned, seed)}") for seed in options.seeds]
        if all(controls):
            for column in ("pruned layers", "pruned layers, wrong units"):
                line[column] = round(statistics.mean(row[column] for row in controls if row), 4)
        dense = [found.get(f"dense-{ratio}-{seed}") for seed in options.seeds]
        if all(dense):
            line["dense + lora"] = round(statistics.mean(row["dense + lora"] for row in dense if row), 4)
        gain = line["full"] - line["full + lora"]
        line["share_of_gain"] = round((line["full"] - line["full + recovered"]) / gain, 3) if gain > 0 else None
        lines.append(line)
    return lines


def label(criterion: str, ratio: float, aligned: bool, seed: int) -> str:
    return f"{criterion}-{ratio}{'-aligned' if aligned else ''}-{seed}"


def jobs_of(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name of a part -> what computes it."""
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in options.seeds:
        jobs[f"full-{seed}"] = lambda seed=seed: full_row(options, seed)
        for criterion, ratio, aligned in ROWS:
            jobs[label(criterion, ratio, aligned, seed)] = (
                lambda row=(criterion, ratio, aligned), seed=seed: loram_row(options, *row, seed)  # type: ignore[misc]
            )
    for seed in options.seeds:
        for criterion, ratio, aligned in ROWS:
            jobs[f"control-{label(criterion, ratio, aligned, seed)}"] = (
                lambda row=(criterion, ratio, aligned), seed=seed: control_row(options, *row, seed)  # type: ignore[misc]
            )
    for ratio in options.dense_ratios:
        for seed in options.seeds:
            jobs[f"dense-{ratio}-{seed}"] = lambda ratio=ratio, seed=seed: dense_row(options, ratio, seed)
    return jobs


def main() -> None:
    parser = provenance.parser(__doc__, base="demo-long", steps=200, shared=True)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--align-steps", type=int, default=200)
    parser.add_argument("--align-lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dense-ratios", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--dense-steps", type=int, help="pre-training steps of the dense models; default: the base's")
    parser.add_argument("--only", nargs="+", help="parts to compute, for example taylor-0.5-0 full-0")
    options = parser.parse_args()
    hush_libraries()
    prefix = f"loram_quality-{options.model}-{options.steps}"
    jobs = jobs_of(options)
    wanted = [name for name in jobs if not options.only or name in options.only]
    rows = {name: provenance.kept(f"{prefix}-{name}", jobs[name]) for name in wanted[options.part]}
    if len(rows) < len(jobs):
        return  # the table is for the run that finds all of them
    settings = {key: getattr(options, key) for key in ("model", "steps", "lr", "align_steps", "align_lr", "seeds")}
    provenance.save("loram_quality", {**settings, "table": table(rows, options), "rows": rows})


if __name__ == "__main__":
    main()

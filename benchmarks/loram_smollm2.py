"""LoRAM on a real model: SmolLM2-135M-Instruct learns GSM8K (gsm8k.py) on a pruned copy of itself.

For each way of pruning the loss of the answers to 100 held-out problems: of the pruned model, with the adapter that it
trained, of the full model with that adapter recovered, and with it scattered into wrong units (negative control).
Beside them the full model alone and with LoRA of its own, and the same model cut down to as many whole layers as fit
into the bytes of each ratio, with LoRA. The first four and the last two layers stay whole. Rows stand in
results/loram_smollm2.jsonl; those that are there are not run again. One thread for each process.

    python benchmarks/loram_smollm2.py --data train.jsonl [--seeds 0 1 2] [--only ROW ...] [--part 0/2]
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gsm8k
import provenance
import torch
from loram_quality import scattered_wrongly

from raymem.cli.console import hush_libraries
from raymem.recipe.axes import full_base
from raymem.recipe.load import recipe_of
from raymem.recipe.schema import Recipe
from raymem.runs.evaluate import evaluate_recipe
from raymem.runs.loram.pipeline import Pipeline
from raymem.runs.resolve import resolve
from raymem.runs.train import launch
from raymem.storage.safetensors_io import read_header, read_tensor, save_tensors

STEPS, LR = 30, 1e-3
CALIBRATION = {"calibration_texts": 64, "calibration_length": 256}
ALIGN = {
    "train": {"steps": 60, "global_batch": 4, "micro_batch": 2, "warmup": 0.1},
    "optimizer": {"kind": "adamw", "lr": 1e-4},
}
"""On the rows that the adapter then learns, answers and all."""
WAYS: dict[str, dict[str, Any]] = {
    f"{criterion} {ratio}{', refit' if refit else ''}": {"criterion": criterion, "ratio": ratio, "refit": refit}
    for ratio in (0.5, 0.25, 0.65, 0.85)
    for criterion, refit in (
        ("wanda", True), ("wanda", False), ("taylor", False), ("random", False), ("taylor", True), ("random", True),
    )
}  # fmt: skip
WAYS |= {f"{name}, aligned": {**WAYS[name], "align": ALIGN} for name in ("wanda 0.5, refit", "wanda 0.85, refit")}


def recipe_for(data: Path, name: str, seed: int, fragment: dict[str, Any]) -> Recipe:
    train = {
        "steps": STEPS, "global_batch": gsm8k.ROWS, "micro_batch": gsm8k.MICRO, "warmup": 0.1,
        "eval_every": STEPS, "save_every": STEPS,
    }  # fmt: skip
    plain = {"adapter": "lora", "optimizer": {"kind": "adamw", "lr": LR}, "train": train}
    raw = gsm8k.raw_recipe(data, plain | fragment, seed)
    raw["data"]["eval"] = [source for source in raw["data"]["eval"] if source["name"] == "answers"]
    slug = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in name)
    return recipe_of({**raw, "name": f"loram-{slug}-{seed}"})


def loss(recipe: Recipe, artifact: str | Path) -> float:
    return round(evaluate_recipe(recipe, str(artifact)).result.loss, 5)


def pruned_row(name: str, data: Path, seed: int) -> dict[str, Any]:
    """Prune, train, recover, verify, compare."""
    base = {"kind": "loram", "seed": seed, **WAYS[name]}
    if base["refit"] or base["criterion"] != "random":
        base |= CALIBRATION
    pipeline = Pipeline(recipe_for(data, name, seed, {"base": base}), status=lambda text: None)
    pipeline.prune()
    pipeline.align()
    outcome = pipeline.train()
    recovered = pipeline.recover()
    pipeline.verify()
    made = pipeline.ready()
    full = made.run.recipe.model_copy(update={"base": full_base()})
    wrong = scattered_wrongly(Path(outcome["artifact"]), recovered, made, seed)
    return {
        "parameters": made.plan.pruned.parameters,
        "peak_bytes": outcome["peak_bytes"],
        "pruned": loss(made.run.recipe, "base"),
        "pruned + adapter": loss(made.run.recipe, outcome["artifact"]),
        "full + recovered": loss(full, recovered),
        "full + wrong units": loss(full, wrong),
    }


def full_row(data: Path, seed: int) -> dict[str, Any]:
    """The full model, untouched and with LoRA of its own."""
    recipe = recipe_for(data, "full", seed, {})
    finished = launch(recipe, status=lambda text: None)
    return {
        "full": loss(recipe, "base"),
        "full + LoRA": loss(recipe, finished.outcome.artifact),
        "peak_bytes": finished.outcome.peak_bytes,
    }


def cut_row(ratio: float, data: Path, seed: int) -> dict[str, Any]:
    """As many whole layers as have at most the parameters that are left at a ratio, with LoRA."""
    probe = Pipeline(
        recipe_for(data, "probe", seed, {"base": {"kind": "loram", "criterion": "random", "ratio": ratio}}),
        status=lambda text: None,
    )
    limit = probe.prune().plan.pruned.parameters
    directory, layers = cut_model(Path(resolve(recipe_for(data, "probe", seed, {})).recipe.model.name or ""), limit)
    recipe = recipe_for(data, f"cut {ratio}", seed, {"model": {"name": str(directory)}})
    finished = launch(recipe, status=lambda text: None)
    return {
        "layers": layers,
        "cut": loss(recipe, "base"),
        "cut + LoRA": loss(recipe, finished.outcome.artifact),
        "peak_bytes": finished.outcome.peak_bytes,
    }


def cut_model(full: Path, limit: int) -> tuple[Path, int]:
    """Write the model without the layers before its last two, so many that at most ``limit`` parameters are left."""
    config = json.loads((full / "config.json").read_text())
    tensors = {
        name: read_tensor(full, entry)
        for file in sorted(full.glob("*.safetensors"))
        for name, entry in read_header(full, file.name)[1].items()
    }

    def layer_of(name: str) -> int | None:
        parts = name.split(".")
        return int(parts[2]) if parts[1] == "layers" else None

    count = config["num_hidden_layers"]
    of_layer = sum(tensor.numel() for name, tensor in tensors.items() if layer_of(name) == 0)
    rest = sum(tensor.numel() for name, tensor in tensors.items() if layer_of(name) is None)
    left = (limit - rest) // of_layer
    kept = [*range(left - 2), count - 2, count - 1]
    directory = gsm8k.STORAGE / f"cut-{left}"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(full, directory, ignore=shutil.ignore_patterns("*.safetensors*", "manifest.json"))
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": left}))
    renamed = {}
    for name, tensor in tensors.items():
        if (layer := layer_of(name)) is None:
            renamed[name] = tensor
        elif layer in kept:
            renamed[name.replace(f".{layer}.", f".{kept.index(layer)}.", 1)] = tensor
    save_tensors(directory / "model.safetensors", renamed)
    return directory, left


def main() -> None:
    parser = provenance.parser(__doc__, shared=True)
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of GSM8K, with test.jsonl beside it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    rows: dict[str, Callable[[Path, int], dict[str, Any]]] = {"full": full_row}
    rows |= {name: partial(pruned_row, name) for name in WAYS}
    rows |= {f"cut {ratio}": partial(cut_row, ratio) for ratio in (0.5, 0.25, 0.65, 0.85)}
    parser.add_argument("--only", nargs="+", choices=rows, default=list(rows), metavar="ROW")
    asked = parser.parse_args()
    hush_libraries()
    torch.set_num_threads(1)
    for seed in asked.seeds:
        for name in asked.only[asked.part]:
            provenance.entered("loram_smollm2", f"{name} | seed {seed}", partial(rows[name], asked.data, seed))


if __name__ == "__main__":
    main()

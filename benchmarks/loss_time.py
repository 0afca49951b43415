"""Step time with the loss in chunks over the whole logits, step by step in turn, on the shape of SmolLM2-135M.

python benchmarks/loss_time.py [--steps 6] [--rows 4]

CPU time of one thread: what other processes do to the machine in between counts little. Also the largest relative
difference of the losses on the way, and the peak of each.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import provenance
import torch

from raymem.memory.meter import PeakMeter, resident_tensors
from raymem.recipe.schema import Recipe
from raymem.training.data.batches import Batch
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater
from raymem.training.step import train_step

LENGTH = 256
MODEL = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
CASES: dict[str, tuple[str, float, float]] = {
    "lora, half of the positions are targets": ("lora", 0.5, 0.93),
    "lora, all positions are targets": ("lora", 1.0, 1.00),
    "full fine-tuning, all positions are targets": ("none", 1.0, 1.03),
}
"""Case -> adapter, share of targets, and the ratio that is aimed at."""


def build(adapter: str, loss: str, precision: str) -> tuple[Any, Any]:
    raw = {
        "name": "loss", "model": {"config": MODEL, "tokenizer": "demo"}, "data": {"train": "demo:text"},
        "adapter": adapter, "loss": loss, "train": {"steps": 1, "precision": precision},
    }  # fmt: skip
    recipe = Recipe.model_validate(raw)
    model = build_model(recipe)
    return model, build_updater(model, recipe)


def batch_of(rows: int, share: float) -> Batch:
    ids = torch.randint(MODEL["vocab_size"], (rows, LENGTH), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    labels = ids.clone()
    labels[:, : LENGTH - int(LENGTH * share)] = -100
    return Batch(ids, labels, None, None)


def compare(adapter: str, share: float, steps: int, rows: int, precision: str) -> dict[str, Any]:
    batch = batch_of(rows, share)
    assert batch.target_positions is not None
    built = {kind: build(adapter, kind, precision) for kind in ("full", "chunked")}
    seconds: dict[str, list[float]] = {kind: [] for kind in built}
    peaks, losses = {}, {kind: [] for kind in built}  # type: ignore[var-annotated]

    def step(kind: str, number: int) -> None:
        model, updater = built[kind]
        began = time.process_time()
        result = train_step(model, [batch], len(batch.target_positions), updater, number, 1e-4, clip_norm=1.0)  # type: ignore[arg-type]
        seconds[kind].append(time.process_time() - began)
        losses[kind].append(float(result.loss))

    for kind, (model, updater) in built.items():
        step(kind, 0)
        resident = list(resident_tensors(model, updater.state().values()))
        with PeakMeter(torch.device("cpu"), lambda held=resident: held) as meter:  # type: ignore[misc]
            step(kind, 1)
        assert meter.peak is not None
        peaks[kind] = meter.peak.allocated_bytes
        seconds[kind].clear()
    for number in range(steps):
        for kind in built if number % 2 else reversed(built):
            step(kind, number + 2)
    paired = [chunked / full for full, chunked in zip(seconds["full"], seconds["chunked"], strict=True)]
    drift = [abs(a - b) / abs(a) for a, b in zip(losses["full"], losses["chunked"], strict=True)]
    return {
        "chunked_over_full": statistics.median(paired), "lowest": min(paired), "highest": max(paired),
        "full_s": statistics.median(seconds["full"]), "largest_loss_difference": max(drift), "peak_bytes": peaks,
    }  # fmt: skip


def main() -> None:
    parser = provenance.parser(__doc__, steps=6)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, (adapter, share, goal) in CASES.items():
        found = compare(adapter, share, arguments.steps, arguments.rows, arguments.precision)
        rows[name] = {**found, "goal": goal}
        print(name, found, flush=True)
    suffix = "" if arguments.precision == "fp32" else f"_{arguments.precision}"
    shape = (
        f"{arguments.rows} rows of {LENGTH} tokens, {arguments.precision}, 1 thread, {arguments.steps} steps in turn"
    )
    provenance.save(f"loss_time{suffix}", {"cases": rows, "model": MODEL, "shape": shape})


if __name__ == "__main__":
    main()

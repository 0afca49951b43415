"""A whole training step of the demo model: MoRAM over LoRA of the same rank, step by step in turn.

python benchmarks/moram_step.py [--steps 20] [--density 0.03] [--rows 4]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import provenance
import torch

from raymem.memory.meter import PeakMeter, resident_tensors
from raymem.recipe.load import packaged_recipe, parse_recipe, read_yaml
from raymem.training.data.batches import Batch
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater
from raymem.training.step import train_step

LENGTH = 256


def candidates(density: float) -> dict[str, dict[str, Any]]:
    moram = {"kind": "moram", "rank": 16, "density": density, "criterion": "random"}
    return {
        "lora": {"kind": "lora", "rank": 16},
        "moram auto": moram,
        "moram fast": {**moram, "formulation": "fast"},
        "moram frugal": {**moram, "formulation": "frugal"},
        "full": {"kind": "none"},
    }


def main() -> None:
    parser = provenance.parser(__doc__, steps=20)
    parser.add_argument("--density", type=float, default=0.03)
    parser.add_argument("--rows", type=int, default=4)
    arguments = parser.parse_args()
    base = read_yaml(packaged_recipe("pretrain"))
    built = {}
    for name, section in candidates(arguments.density).items():
        recipe = parse_recipe({**base, "name": "step", "adapter": section, "scaling": {"num_workers": 0}})
        model = build_model(recipe)
        built[name] = (model, build_updater(model, recipe))
    vocabulary = base["model"]["config"]["vocab_size"]
    ids = torch.randint(vocabulary, (arguments.rows, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids, None, None)

    def step(name: str, number: int) -> None:
        model, updater = built[name]
        train_step(model, [batch], ids.numel() - arguments.rows, updater, number, 1e-3, clip_norm=1.0)

    peaks = {}
    for name, (model, updater) in built.items():
        step(name, 0)
        resident = list(resident_tensors(model, updater.state().values()))
        with PeakMeter(torch.device("cpu"), lambda held=resident: held) as meter:  # type: ignore[misc]
            step(name, 1)
        assert meter.peak is not None
        peaks[name] = meter.peak.allocated_bytes
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for number in range(arguments.steps):
        for name in built:
            began = time.perf_counter()
            step(name, number + 2)
            seconds[name].append(time.perf_counter() - began)
    ratios = {
        name: statistics.median(mine / lora for mine, lora in zip(times, seconds["lora"], strict=True))
        for name, times in seconds.items()
    }
    provenance.save(
        "moram_step",
        {
            "over_lora": ratios, "peak_mb": {name: peak / 2**20 for name, peak in peaks.items()},
            "lora_s": statistics.median(seconds["lora"]), "density": arguments.density, "steps": arguments.steps,
            "threads": torch.get_num_threads(),
            "model": f"demo (random weights), rank 16, {arguments.rows} rows of {LENGTH} tokens, fp32",
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()

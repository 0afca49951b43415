"""Which methods go together best under a budget: SmolLM2-135M learns GSM8K (gsm8k.py) in 300, 500 and 800 MiB.

Two sweeps a budget, with as many trials each: one over all methods, one over LoRA with checkpointing alone (its rank,
learning rate, micro-batch, and whether the model is in 4 bits). Both start only what the planner says fits. The best
trial of each, by the loss of 60 problems, is trained again for more steps and judged by 100 others. Resumable.

    python benchmarks/budgets.py --data train.jsonl [--budgets 300 500 800] [--samples 6] [--seed 0]
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gsm8k
import provenance

import raymem
from raymem.cli.console import hush_libraries

SWEEP_STEPS, STEPS = 8, 24


def choice(*values: Any, **when: list[Any]) -> dict[str, Any]:
    conditions = {"when": {name.replace("__", "."): kinds for name, kinds in when.items()}} if when else {}
    return {"type": "choice", "choices": list(values), **conditions}


ADAPTERS: dict[str, Any] = {"adapter__kind": ["lora", "moram"]}
SHARED: dict[str, Any] = {
    "adapter.rank": choice(4, 8, 16, 32, **ADAPTERS),
    "train.micro_batch": choice(1, 2, 4),
    "optimizer.lr": {"type": "float", "low": 1e-4, "high": 4e-3, "log": True},
}
SPACES: dict[str, dict[str, Any]] = {
    "all methods": {
        "adapter.kind": choice("none", "lora", "moram"),
        "base.quantize": choice("none", "nf4", **ADAPTERS),
        "activations.kind": choice("none", "checkpoint", "loract"),
        "activations.rank": choice(1 / 8, 1 / 4, activations__kind=["loract"]),
        "optimizer.kind": choice("adamw", "mlorc_adamw", adapter__kind=["none"]),
        **SHARED,
    },
    "LoRA, checkpointing": {"base.quantize": choice("none", "nf4"), **SHARED},
}


def base_recipe(data: Path, seed: int, steps: int, fragment: Mapping[str, Any], *, evaluated: str) -> dict[str, Any]:
    raw = gsm8k.raw_recipe(data, {"adapter": "lora", "activations": "checkpoint", **fragment}, seed)
    raw["data"]["eval"] = [source for source in raw["data"]["eval"] if source["name"] == evaluated]
    train = {"steps": steps, "warmup": 0.1, "eval_every": steps, "save_every": steps}
    return {**raw, "train": {**raw["train"], **train}}


def row(data: Path, budget: int, name: str, samples: int, seed: int) -> dict[str, Any]:
    """Search a space, then train the best of it anew."""
    raw = base_recipe(data, seed, SWEEP_STEPS, {}, evaluated="tuning")
    title = f"budget-{budget}-{''.join(filter(str.isalpha, name))}-{seed}"
    swept = raymem.sweep({**raw, "name": title}, SPACES[name], budget=f"{budget}MiB", samples=samples, name=title)
    assert swept.best is not None, "no trial finished"
    best = raymem.load_recipe(swept.best).to_dict()
    longer = base_recipe(data, seed, STEPS, {}, evaluated="answers")
    train = {**longer["train"], "micro_batch": best["train"]["micro_batch"]}
    trained = raymem.train({**best, "name": f"{title}-best", "train": train, "data": longer["data"]})
    done = [trial for trial in swept.rows if trial.status == "finished"]
    refused = sum(trial.status == "refused" for trial in swept.rows)
    return {
        "point": min(done, key=lambda trial: trial.metrics["eval_loss"]).point,
        "started": len(swept.rows) - refused,
        "refused": refused,
        "above_budget": sum((trial.measured_bytes or 0) > budget * 2**20 for trial in done),
        "peak_bytes": trained.outcome.peak_bytes,
        "predicted_bytes": trained.predicted_peak_bytes,
        "loss": trained.outcome.eval_loss,
        "train_s": round(trained.train_s, 1),
    }


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of GSM8K, with test.jsonl beside it")
    parser.add_argument("--budgets", type=int, nargs="+", default=[300, 500, 800], help="MiB; default: %(default)s")
    parser.add_argument("--samples", type=int, default=6, help="trials of each sweep; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    hush_libraries()
    for budget in asked.budgets:
        for name in SPACES:
            key = f"{budget} MiB | {name} | {asked.samples} trials, seed {asked.seed}"
            provenance.entered("budgets", key, partial(row, asked.data, budget, name, asked.samples, asked.seed))


if __name__ == "__main__":
    main()

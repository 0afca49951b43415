"""Quality of MoRAM on the demo task, against LoRA, SHiRA and randomly chosen connections, at equal trainable state.

Every method trains r (m + n) values per matrix. Each gets the same learning rates to choose from, judged on one seed by
half of the evaluation rows; the best one then runs on three other seeds, judged by the other half.

    python benchmarks/make_base.py --model demo-long --storage raymem-runs   # once
    python benchmarks/moram_quality.py [--model demo-long] [--steps 200] [--rank 8] [--density 0.03 0.125]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import moram_demo
import provenance

from raymem.console import hush_libraries

LEARNING_RATES = (5e-4, 1.5e-3, 4e-3, 1e-2, 2.5e-2)


def methods(rank: int, densities: list[float]) -> dict[str, tuple[list[str], bool]]:
    """Name -> (recipe overrides, whether it is PEFT's SHiRA)."""
    shared = [f"adapter.rank={rank}"]
    found = {
        "lora": (["adapter.kind=lora", *shared, f"adapter.alpha={2 * rank}"], False),
        "shira": (["adapter.kind=lora", *shared], True),
    }
    for density in densities:
        for criterion in ("gradient", "random"):
            options = [f"adapter.alpha={2 * rank}", f"adapter.density={density}", f"adapter.criterion={criterion}"]
            found[f"moram {criterion} {density}"] = (["adapter.kind=moram", *shared, *options], False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-long")
    parser.add_argument("--storage", type=Path, default=Path("raymem-runs"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--density", type=float, nargs="+", default=[0.03, 0.125])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=LEARNING_RATES)
    arguments = parser.parse_args()
    hush_libraries()

    def recipe(overrides: list[str], lr: float, seed: int) -> Any:
        run = [f"optimizer.lr={lr}", f"seed={seed}", f"train.steps={arguments.steps}"]
        return moram_demo.recipe_for(arguments.model, arguments.storage, *overrides, *run)

    figures: dict[str, Any] = {}
    for name, (overrides, as_shira) in methods(arguments.rank, arguments.density).items():
        any_recipe = recipe(overrides, arguments.lrs[0], 0)
        rows, eval_rows = moram_demo.rows_of(any_recipe, "train"), moram_demo.rows_of(any_recipe, "eval")
        tuning, judging = (moram_demo.EverySecond(eval_rows, first) for first in (0, 1))
        tuned = {
            lr: moram_demo.finetuned_loss(recipe(overrides, lr, 100), rows, tuning, as_shira=as_shira)
            for lr in arguments.lrs
        }
        best = min(tuned, key=tuned.__getitem__)
        losses = [
            moram_demo.finetuned_loss(recipe(overrides, best, seed), rows, judging, as_shira=as_shira)
            for seed in range(arguments.seeds)
        ]
        figures[name] = {"tuning": tuned, "lr": best, "losses": losses, "mean": statistics.mean(losses)}
        print(name, figures[name], flush=True)
    gradient = [figures[f"moram gradient {density}"]["mean"] for density in arguments.density]
    at_random = [figures[f"moram random {density}"]["mean"] for density in arguments.density]
    provenance.save(
        "moram_quality",
        {
            "model": arguments.model, "task": "demo:functions", "steps": arguments.steps, "rank": arguments.rank,
            "gradient_below_random": [one < other for one, other in zip(gradient, at_random, strict=True)],
            "methods": figures,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Quality of MoRAM on the demo task, against LoRA, SHiRA and randomly chosen connections, at equal trainable state.

Every method trains r (m + n) values per matrix. Each gets the same learning rates to choose from, judged on one seed by
half of the evaluation rows; the best one then runs on three other seeds, judged by the other half. Runs that were done
before are not repeated; several processes may share the methods.

    python benchmarks/make_base.py --model demo-long --storage raymem-runs   # once
    python benchmarks/moram_quality.py [--model demo-long] [--steps 200] [--rank 8] [--density 0.03 0.125] [--part 0/2]
"""

from __future__ import annotations

import statistics
from typing import Any

import moram_demo
import provenance

from raymem.cli.console import hush_libraries
from raymem.training.data.packed.dataset import PackedRows

LEARNING_RATES = (5e-4, 1.5e-3, 4e-3, 1e-2, 2.5e-2)
TUNING_SEED = 100


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
    parser = provenance.parser(__doc__, base="demo-long", steps=200, shared=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--density", type=float, nargs="+", default=[0.03, 0.125])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=LEARNING_RATES)
    arguments = parser.parse_args()
    hush_libraries()

    def recipe(overrides: list[str], lr: float, seed: int) -> Any:
        run = [f"optimizer.lr={lr}", f"seed={seed}", f"train.steps={arguments.steps}"]
        return moram_demo.recipe_for(arguments.model, arguments.storage, *overrides, *run)

    contestants = methods(arguments.rank, arguments.density)
    any_recipe = recipe([], arguments.lrs[0], 0)
    rows, eval_rows = moram_demo.rows_of(any_recipe, "train"), moram_demo.rows_of(any_recipe, "eval")
    tuning, judging = (moram_demo.EverySecond(eval_rows, first) for first in (0, 1))

    def loss(name: str, lr: float, seed: int, judged_by: PackedRows) -> float:
        overrides, as_shira = contestants[name]
        half = "tuning" if judged_by is tuning else "judging"
        return provenance.kept(
            f"moram_quality-{arguments.model}-{arguments.steps}-r{arguments.rank}-{name}-{lr}-{seed}-{half}",
            lambda: moram_demo.finetuned_loss(recipe(overrides, lr, seed), rows, judged_by, as_shira=as_shira),
        )

    figures: dict[str, Any] = {}
    for name in list(contestants)[arguments.part]:
        tuned = {lr: loss(name, lr, TUNING_SEED, tuning) for lr in arguments.lrs}
        best = min(tuned, key=tuned.__getitem__)
        losses = [loss(name, best, seed, judging) for seed in range(arguments.seeds)]
        figures[name] = {"tuning": tuned, "lr": best, "losses": losses, "mean": statistics.mean(losses)}
        print(name, figures[name], flush=True)
    if len(figures) < len(contestants):
        return
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

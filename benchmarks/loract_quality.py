"""Quality of LoRAct on the demo task: the loss that compressed training reaches, against uncompressed training.

Every run is a recipe of its own on ``--storage`` and resumes where it was stopped; finished ones are not run again. The
goal is that mean(eval loss - uncompressed) is at most 5 % of what uncompressed training lowers the loss by, and clearly
less than that of the negative control, rank n/32 with every input compressed.

    python benchmarks/make_base.py --model demo-long --storage raymem-runs   # once
    python benchmarks/loract_quality.py [--steps 200] [--seeds 3] [--part 0/2]
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import provenance

from raymem.cli.console import hush_libraries
from raymem.recipe.load import load_recipe, packaged_recipe
from raymem.recipe.schema import Recipe
from raymem.runs.train import launch

CONTROLS = ("layer-32-all", "sublayer-32-all")
VARIANTS: dict[str, str] = {
    "exact": "none",
    **{f"{scope}-{part}": f"{{kind: loract, rank: {1 / part}, scope: {scope}}}" for scope in ("layer", "sublayer")
       for part in (8, 4)},
    **{f"{scope}-8-all": f"{{kind: loract, rank: 0.125, scope: {scope}, first_input: compressed}}"
       for scope in ("layer", "sublayer")},
    **{f"{scope}-32-all": f"{{kind: loract, rank: 0.03125, scope: {scope}, first_input: compressed}}"
       for scope in ("layer", "sublayer")},
}  # fmt: skip


def recipe_for(variant: str, seed: int, model: str, steps: int, storage: Path, extra: Sequence[str]) -> Recipe:
    return load_recipe(
        packaged_recipe("demo"),
        [
            f"name=loract-{model}-{steps}-{variant}-{seed}", f"model.name={model}", f"activations={VARIANTS[variant]}",
            f"train.steps={steps}", f"train.eval_every={steps}", f"train.save_every={max(1, steps // 8)}",
            f"seed={seed}", "scaling.num_workers=0", f"storage.path={storage}", "storage.num_to_keep=1",
            "tracking=none", *extra,
        ],
    )  # fmt: skip


def eval_loss(recipe: Recipe) -> float:
    found = launch(recipe, status=lambda text: None).outcome.eval_loss
    assert found is not None
    return found


def main() -> None:
    parser = provenance.parser(__doc__, base="demo-long", steps=200, shared=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    hush_libraries()
    variants = ["exact", *(name for name in arguments.variants if name != "exact")]

    def recipe(variant: str, seed: int, *extra: str, steps: int = arguments.steps) -> Recipe:
        return recipe_for(variant, seed, arguments.model, steps, arguments.storage, extra)

    # One step of a vanishing rate: the loss of the untrained model, by the same evaluation.
    untrained = recipe("exact", 0, "optimizer.lr=1e-12", steps=1)
    start = provenance.kept(untrained.name, lambda: eval_loss(untrained))
    runs = [recipe(name, seed) for seed in range(arguments.seeds) for name in variants]
    found = {run.name: provenance.kept(run.name, functools.partial(eval_loss, run)) for run in runs[arguments.part]}
    if len(found) < len(runs):
        return
    losses = {name: [found[recipe(name, seed).name] for seed in range(arguments.seeds)] for name in variants}
    decrease = start - statistics.mean(losses["exact"])
    rows: dict[str, dict[str, Any]] = {}
    for name in variants:
        gaps = [loss - exact for loss, exact in zip(losses[name], losses["exact"], strict=True)]
        rows[name] = {
            "eval_loss": losses[name],
            "mean_gap": statistics.mean(gaps),
            "gap_of_decrease": statistics.mean(gaps) / decrease,
        }
    goals = {name: rows[name]["gap_of_decrease"] <= 0.05 for name in variants if name.endswith(("-8", "-4"))}
    provenance.save(
        "loract_quality",
        {
            "model": arguments.model, "task": "demo:functions", "adapter": "LoRA r16", "steps": arguments.steps,
            "untrained_loss": start, "decrease": decrease, "goal": 0.05, "goals_met": goals,
            "negative_controls": [name for name in CONTROLS if name in variants], "runs": rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()

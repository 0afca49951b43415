"""Sweeps under a budget on the demo model: joint space, 30 trials, against a random search that knows no budget.

The budget is the median of what random points of the space need, so about half of the space does not fit. The random
search starts whatever it draws; what went above the budget would have died on a device of that size, so the best loss
that counts is that of trials within it. Every trial trains a few steps, seconds long; MoRAM chooses its connections
from one batch instead of eight, which would take longer than that. Resumable: sweeps go on by themselves.

    python benchmarks/sweep_quality.py [--samples 30] [--steps 4] [--seeds 0 1 2] [--storage raymem-runs]
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import provenance

from raymem.cli.console import hush_libraries
from raymem.errors import RecipeError
from raymem.planner import Planner
from raymem.recipe.load import load_recipe, packaged_recipe
from raymem.recipe.schema import Recipe
from raymem.recipe.space import Space, sample
from raymem.recipe.space_load import load_space, recipe_at
from raymem.seeds import derive
from raymem.storage.storage import Storage
from raymem.sweeps import search
from raymem.sweeps.driver import sweep
from raymem.sweeps.journal import open_study
from raymem.sweeps.options import Objective, SweepOptions
from raymem.sweeps.report import SweepRow
from raymem.sweeps.search import started

OBJECTIVE = Objective(("eval_loss",))
UNLIMITED = 1 << 40


def recipe_for(storage: Path, name: str, seed: int, steps: int) -> Recipe:
    small = storage / "sweep-eval.jsonl"
    overrides = [
        f"name={name}", f"seed={seed}", f"train.steps={steps}", f"train.eval_every={steps // 2}", "tracking=none",
        f"train.save_every={steps}", "adapter={kind: moram, selection_batches: 1}",
        "data.sequence_length=64", f"data.eval={small}", f"storage.path={storage}",
    ]  # fmt: skip
    return load_recipe(packaged_recipe("demo"), overrides)


def median_need(recipe: Recipe, space: Space, points: int) -> int:
    """Return the median of what a worker needs at random points, in bytes."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = []
    with Planner() as planner:
        for number in range(points):
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=derive(0, "median", number) % 2**32))
            trial = study.ask()
            try:
                point = recipe_at(recipe, sample(space, recipe.to_dict(), partial(search.draw, trial)), "point")
            except RecipeError:
                continue
            found.append(planner.plan(point).capacity_bytes)
    return int(statistics.median(found))


def facts(rows: list[SweepRow], budget: int, seconds: float) -> dict[str, Any]:
    done = [row for row in rows if row.status == "finished" and row.measured_bytes is not None]
    errors = [abs((row.measured_bytes or 0) / (row.predicted_bytes or 1) - 1) for row in done]
    within = [row.metrics["eval_loss"] for row in done if (row.measured_bytes or 0) <= budget]
    tried = [row for row in rows if row.status != "refused"]
    best, curve = float("inf"), []
    for row in tried:
        if row in done and (row.measured_bytes or 0) <= budget:
            best = min(best, row.metrics["eval_loss"])
        curve.append(None if best == float("inf") else round(best, 4))
    return {
        "started": len(tried),
        "refused": len(rows) - len(tried),
        "finished": len(done),
        "above_budget": sum((row.measured_bytes or 0) > budget for row in done),
        "worst_prediction_percent": round(100 * max(errors), 3),
        "best_loss_within_budget": min(within),
        "best_loss_of_all": min(row.metrics["eval_loss"] for row in done),
        "median_overhead_s": round(statistics.median(row.overhead_s or 0.0 for row in done), 2),
        "median_train_s": round(statistics.median(row.metrics["train_s"] for row in done), 2),
        "seconds": round(seconds, 1),
        "best_so_far": curve,
    }


def main() -> None:
    parser = provenance.parser(__doc__, steps=4)
    parser.add_argument("--storage", type=Path, default=Path("raymem-runs"))
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    hush_libraries()
    storage = options.storage.resolve()
    storage.mkdir(parents=True, exist_ok=True)
    from raymem.training.data.demo import ensure_demo

    corpus = ensure_demo(storage / "cache").corpus("functions", "eval")
    (storage / "sweep-eval.jsonl").write_text("".join(corpus.read_text().splitlines(keepends=True)[:24]))
    probe = recipe_for(storage, "probe", 0, options.steps)
    space = load_space("joint", probe)
    budget = provenance.kept("sweep_quality-budget", lambda: median_need(probe, space, 40))
    runs: dict[str, Any] = {}
    for seed in options.seeds:
        for kind, limit in (("tpe", budget), ("random", UNLIMITED)):
            name = f"sweep-{kind}-{options.samples}-{options.steps}-{seed}"

            def work(kind: str = kind, limit: int = limit, name: str = name, seed: int = seed) -> dict[str, Any]:
                recipe = recipe_for(storage, name, seed, options.steps)
                wanted = SweepOptions(limit, options.samples, OBJECTIVE, kind, early_stopping=False)
                began = time.perf_counter()
                swept = sweep(recipe, space, wanted, fresh=True, status=print)
                study = open_study(Storage.open(swept.folder), OBJECTIVE, name)
                asked = study.get_trials(deepcopy=False)
                found = facts(swept.rows, budget, time.perf_counter() - began)
                judged = [t.user_attrs["judged_s"] for t in asked if not started(t) and "judged_s" in t.user_attrs]
                return found | {"mean_refusal_s": round(statistics.mean(judged), 3) if judged else None}

            runs[f"{kind}/{seed}"] = provenance.kept(f"sweep_quality-{name}", work)
    table = {
        kind: {
            figure: statistics.median(runs[f"{kind}/{seed}"][figure] for seed in options.seeds)
            for figure in ("best_loss_within_budget", "best_loss_of_all", "above_budget", "refused")
        }
        for kind in ("tpe", "random")
    }
    shared = {"budget_bytes": budget, "samples": options.samples, "steps": options.steps}
    provenance.save("sweep_quality", {**shared, "median_over_seeds": table, "runs": runs})
    draw(json.loads((provenance.RESULTS / "sweep_quality.json").read_text()), options.seeds)


def draw(result: dict[str, Any], seeds: list[int]) -> None:
    """Best loss so far over started trials."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for kind, color, label in (("tpe", "tab:blue", "raymem sweep"), ("random", "0.6", "random, no budget known")):
        for seed in seeds:
            curve = result["runs"][f"{kind}/{seed}"]["best_so_far"]
            points = [(index, value) for index, value in enumerate(curve, 1) if value is not None]
            axes.plot(*zip(*points, strict=True), color=color, drawstyle="steps-post",
                      label=label if seed == seeds[0] else None)  # fmt: skip
    axes.set_xlabel("trials started")
    axes.set_ylabel("best evaluation loss within the budget")
    axes.legend()
    figure.savefig(provenance.RESULTS / "sweep_quality.png", dpi=120)


if __name__ == "__main__":
    main()

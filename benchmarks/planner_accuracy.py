"""Predicted against measured peak of an optimizer step, for every method on small models; one JSON with all errors.

On a machine with a GPU the same recipes run there, with ``max_memory_allocated`` and ``max_memory_reserved`` beside the
prediction. The cases are those of tests/planner.

    python benchmarks/planner_accuracy.py [--families llama qwen3 gpt2] [--layers 2 4] [--only lora] [--gpu]
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import provenance

sys.path.append(str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["llama", "qwen3", "gpt2"])
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--only", nargs="+", help="cases to run; by default all")
    parser.add_argument("--gpu", action="store_true", help="measure on this machine's GPU")
    arguments = parser.parse_args()
    from raymem.planner import plan_many
    from tests.helpers.planner_cases import FRAGMENTS

    chosen = [
        (name, family, layers)
        for family in arguments.families
        for layers in arguments.layers
        for name in arguments.only or FRAGMENTS
        if not ("linear" in name and family == "gpt2")  # its linear layers are Conv1D
    ]
    recipes = [recipe_of(*one, gpu=arguments.gpu) for one in chosen]
    rows = []
    for one, recipe, plan in zip(chosen, recipes, plan_many(recipes, timeout_s=7200), strict=True):
        if isinstance(plan, Exception):
            raise plan
        rows.append(compare(one, recipe, plan, gpu=arguments.gpu))
        print(rows[-1], flush=True)
    errors = [abs(row["error_percent"]) for row in rows]
    device = "gpu" if arguments.gpu else "cpu"
    summary = {"cases": len(rows), "largest_error_percent": max(errors), "mean_error_percent": sum(errors) / len(rows)}
    provenance.save(f"planner_accuracy_{device}", {**summary, "tokens": "2 x 128", "rows": rows})


def recipe_of(name: str, family: str, layers: int, *, gpu: bool) -> Any:
    """The recipe of one case."""
    from tests.helpers.planner_cases import case

    recipe = case(name, family, layers)
    return recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update={"use_gpu": gpu})})


def compare(case: tuple[str, str, int], recipe: Any, plan: Any, *, gpu: bool) -> dict[str, Any]:
    """Return the predicted peak, and the one that the step then took."""
    import torch

    from raymem.testing import measure_step

    measured = measure_step(recipe)
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    name, family, layers = case
    predicted = plan.step_peak_bytes
    return {
        "case": name,
        "family": family,
        "layers": layers,
        "predicted_bytes": predicted,
        "measured_bytes": measured.allocated_bytes,
        "error_percent": round(100 * (predicted / measured.allocated_bytes - 1), 3),
        "predicted_reserved_bytes": plan.reserved_bytes,
        "measured_reserved_bytes": measured.reserved_bytes,
        "planning_s": plan.seconds,
    }


if __name__ == "__main__":
    main()

"""Predicted against measured peak of a real model on real rows: SmolLM2-135M and GSM8K, trained on the CPU.

Every method with 1 and 4 rows per forward pass, rows of 128 and 256 tokens, and the three ways of packing: 48 trainings
of a few steps, each in a process of its own. What is measured is what `raymem train` measures and shows. A row that is
done is kept (results/parts/), so that the command goes on where it stopped.

Plans are of the larger case, in which some row of a step holds several examples or padding, and attention needs a mask;
training measures steps 2 and 3, and goes on to the first step with such a row.

    python benchmarks/planner_smollm2.py --model DIRECTORY --data train.jsonl [--part 0/2] [--only lora]
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from typing import Any

import provenance

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora"},
    "loract": {"adapter": "lora", "activations": "loract"},
    "moram": {"adapter": {"kind": "moram", "selection_batches": 1}},  # each takes as much memory as the next
    "mlorc": {"adapter": "none", "optimizer": "mlorc_adamw"},
}
PASSES = 2
"""Micro-batches of a step: gradients accumulate."""
STEPS = 6


def main() -> None:
    parser = provenance.parser(__doc__, shared=True)
    parser.add_argument("--model", required=True, help="directory with SmolLM2's config, weights and tokenizer")
    parser.add_argument("--data", required=True, help="JSON lines with question and answer")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--row", help=argparse.SUPPRESS)  # by which it calls itself
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(json.dumps(row_of(json.loads(arguments.row))))
        return
    cases = list(itertools.product(arguments.only, (1, 4), (128, 256), ("bfd", "wrapped", "none")))
    rows = [one(case, arguments.model, arguments.data) for case in cases[arguments.part]]
    if len(rows) < 48:
        return
    errors = [abs(row["error_percent"]) for row in rows]
    summary = {
        "cases": len(rows),
        "largest_error_percent": max(errors),
        "mean_error_percent": sum(errors) / len(errors),
    }
    provenance.save("planner_smollm2", {**summary, "passes": PASSES, "rows": rows})


def one(case: tuple[str, int, int, str], model: str, data: str) -> dict[str, Any]:
    """Return the row of one case, from a process of its own."""
    method, micro_batch, length, packing = case
    recipe = {
        **METHODS[method],
        "name": "row",
        "model": {"name": model},
        "data": {
            "train": [{"path": data, "columns": {"prompt": "question", "completion": "answer"}}],
            "sequence_length": length,
            "packing": packing,
        },
        "train": {"steps": STEPS, "global_batch": PASSES * micro_batch, "micro_batch": micro_batch},
        "scaling": {"num_workers": 0},
        "tracking": "none",
    }

    def work() -> dict[str, Any]:
        command = [sys.executable, __file__, "--model", model, "--data", data, "--row", json.dumps(recipe)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{case}: {done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    facts = {"method": method, "micro_batch": micro_batch, "sequence_length": length, "packing": packing}
    return {**facts, **provenance.kept("-".join(["smollm2", *map(str, case)]), work)}


def row_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """Plan a recipe and train it."""
    import raymem

    with tempfile.TemporaryDirectory() as storage:
        recipe = {**recipe, "storage": {"path": storage}}
        plan = raymem.plan(recipe)
        result = raymem.train(recipe)
    assert plan.traced and result.peak_bytes is not None
    predicted, measured = plan.step_peak_bytes, result.peak_bytes
    return {
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "error_percent": round(100 * (predicted / measured - 1), 3),
        "steps": result.steps,
        "plan_phases": {name: phase["peak_bytes"] for name, phase in plan.phases.items()},
    }


if __name__ == "__main__":
    main()

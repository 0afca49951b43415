"""Predicted against measured peak of a real model on real rows: SmolLM2-135M and GSM8K, trained on the CPU.

Every method with 1 and 4 rows per forward pass, rows of 128 and 256 tokens, and the three ways of packing: 48 trainings
of a few steps. What is measured is what `raymem train` measures and shows. A row that is done is kept (results/parts/),
so that the command goes on where it stopped.

Predicted is what `raymem train` says, which knows the data: whether attention needs a mask somewhere, and how many
targets a micro-batch has at most. `raymem plan` knows no data and plans the largest case; training measures steps 2 and
3, and goes on to the first step with a mask.

    python benchmarks/planner_smollm2.py --data train.jsonl [--part 0/2] [--only lora]
"""

from __future__ import annotations

import itertools
import tempfile
from functools import cache, partial
from typing import Any

import provenance

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora"},
    "loract": {"adapter": "lora", "activations": "loract"},
    "moram": {"adapter": {"kind": "moram", "selection_batches": 1}},  # each takes as much memory as the next
    "mlorc": {"adapter": "none", "optimizer": "mlorc_adamw"},
}
STEPS = 4


def main() -> None:
    parser = provenance.parser(__doc__, shared=True)
    parser.add_argument("--data", required=True, help="JSON lines with question and answer")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    cases = list(itertools.product(arguments.only, (1, 4), (128, 256), ("bfd", "wrapped", "none")))
    with tempfile.TemporaryDirectory() as storage:  # one for all: data is prepared once for each length and packing
        rows = [one(case, arguments.data, storage) for case in cases[arguments.part]]
    if len(rows) < 48:
        return
    errors = [abs(row["error_percent"]) for row in rows]
    summary = {
        "cases": len(rows),
        "largest_error_percent": max(errors),
        "mean_error_percent": sum(errors) / len(errors),
    }
    provenance.save("planner_smollm2", {**summary, "rows": rows})


@cache
def model() -> str | None:
    """Return where the model lies, for all rows: each has a storage of its own."""
    from raymem.cache import cache_root
    from raymem.recipe.schema import ModelSection
    from raymem.training.model.smollm2 import located

    return located(ModelSection(name="smollm2"), cache_root()).name


def one(case: tuple[str, int, int, str], data: str, storage: str) -> dict[str, Any]:
    """Return the row of one case."""
    method, micro_batch, length, packing = case
    recipe = {
        **METHODS[method],
        "name": "-".join(map(str, case)),
        "model": {"name": model()},
        "data": {
            "train": [{"path": data, "max_rows": 400, "columns": {"prompt": "question", "completion": "answer"}}],
            "sequence_length": length,
            "packing": packing,
        },
        "train": {"steps": STEPS, "global_batch": micro_batch, "micro_batch": micro_batch},
        "scaling": {"num_workers": 0},
        "budget": "64GiB",
        "storage": {"path": storage},
        "tracking": "none",
    }

    facts = {"method": method, "micro_batch": micro_batch, "sequence_length": length, "packing": packing}
    return {**facts, **provenance.kept("-".join(["smollm2", *map(str, case)]), partial(row_of, recipe))}


def row_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """Train a recipe; what is predicted before is compared with what is measured."""
    import raymem

    result = raymem.train(recipe)
    predicted, measured = result.predicted_peak_bytes, result.peak_bytes
    assert predicted is not None and measured is not None
    return {
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "error_percent": round(100 * (predicted / measured - 1), 3),
    }


if __name__ == "__main__":
    main()

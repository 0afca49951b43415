"""How many calibration batches a selection needs: recall of the choice of many batches, against N; and its footprint.

Recall against a reference from other batches than the N says how much of the choice is signal: it is bounded by what
two references from disjoint batches have in common, which is given too.

    python benchmarks/moram_selection.py [--model demo-long] [--reference 64] [--density 0.03]
"""

from __future__ import annotations

import time
from typing import Any

import moram_demo
import provenance
import torch

from raymem.cli.console import hush_libraries
from raymem.memory.meter import PeakMeter
from raymem.methods.moram import select_indices
from raymem.training.data.batches import Batch, global_targets, rank_batches
from raymem.training.loss import forward_loss_sum
from raymem.training.model.build import build_model

COUNTS = (1, 2, 4, 8, 16, 32)
EVERYTHING = 1 << 50

Chosen = dict[str, torch.Tensor]


def recall(found: Chosen, reference: Chosen, inputs: dict[str, int]) -> float:
    """Share of the reference's connections that were found."""
    both = whole = 0.0
    for name, index in reference.items():
        dense = torch.zeros(len(index), inputs[name]).scatter_(1, index.long(), 1.0)
        both += float(dense.gather(1, found[name].long()).sum())
        whole += index.numel()
    return both / whole


def main() -> None:
    parser = provenance.parser(__doc__, base="demo-long")
    parser.add_argument("--reference", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.03)
    arguments = parser.parse_args()
    hush_libraries()
    overrides = ["adapter.kind=moram", f"adapter.density={arguments.density}", "activations=checkpoint"]
    recipe = moram_demo.recipe_for(arguments.model, arguments.storage, "adapter.alpha=32", *overrides)
    rows = moram_demo.rows_of(recipe, "train")
    sampler, model = moram_demo.sampler_of(recipe, rows), build_model(recipe)
    batches: list[tuple[Batch, int]] = []
    for number in range(2 * arguments.reference):
        ids = sampler.ids(number)
        batches.append((rank_batches(rows, ids, 0, 1, len(ids))[0], global_targets(rows, ids)))

    def loss(of: Any, batch: tuple[Batch, int]) -> torch.Tensor:
        return forward_loss_sum(of, batch[0], mixed=False) / batch[1]

    def chosen(part: list[tuple[Batch, int]], **further: Any) -> Chosen:
        found = select_indices(model, part, loss=loss, **further)
        return {name: index.clone() for name, index in found.items()}

    inputs = {name: model.get_submodule(name).in_features for name in chosen(batches[:1])}
    first, second = batches[: arguments.reference], batches[arguments.reference :]
    figures: dict[str, Any] = {}
    for criterion in ("gradient", "absolute_gradient"):
        options = {"criterion": criterion, "group_bytes": EVERYTHING}  # the same choice, in one pass over the batches
        reference, other = chosen(first, **options), chosen(second, **options)
        counts = [count for count in COUNTS if count < arguments.reference]
        within = {n: recall(chosen(first[:n], **options), reference, inputs) for n in counts}
        unseen = {n: recall(chosen(second[:n], **options), reference, inputs) for n in counts}
        halves = recall(other, reference, inputs)
        figures[criterion] = {"of_a_superset": within, "of_other_batches": unseen, "two_references": halves}
        print(criterion, figures[criterion], flush=True)
    footprint = {}
    for name, limit in (("default groups", None), ("one matrix", 1), ("everything", EVERYTHING)):
        began = time.perf_counter()
        with PeakMeter(torch.device("cpu"), lambda: []) as meter:
            chosen(batches[:2], group_bytes=limit)
        assert meter.peak is not None
        footprint[name] = {
            "peak_mb": meter.peak.allocated_bytes / 2**20,
            "seconds_for_2_batches_metered": time.perf_counter() - began,
        }
    provenance.save(
        "moram_selection",
        {
            "model": arguments.model, "reference_batches": arguments.reference, "density": arguments.density,
            "random_recall": arguments.density, "recall": figures, "footprint": footprint,
            "target_mb": sum(4 * model.get_submodule(n).out_features * i for n, i in inputs.items()) / 2**20,
            "batch": f"{recipe.train.global_batch} rows of {recipe.data.sequence_length} tokens",
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()

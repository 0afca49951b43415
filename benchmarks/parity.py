"""Numerical parity: every method on 1, 2 and 4 workers, by DDP and FSDP2, with chunked loss and checkpointing.

``python benchmarks/parity.py`` trains a tiny model in fp32 on the CPU, some minutes on two cores, compares losses and
trained weights with those of one process with the full loss, and asks whether ranks hold the same bits. It writes
``results/parity.json`` and docs/numerics.md; its exit status is 1 if a difference is above its limit.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import provenance
import torch
from torch.distributed.tensor import DTensor

from raymem.methods.loram import PruneOptions, prune_model
from raymem.recipe.load import parse_recipe
from raymem.recipe.schema import Recipe
from raymem.testing.processes import in_processes
from raymem.testing.suite import merged, prepare_split, run_storage
from raymem.testing.tiny import save_tiny_model, write_examples
from raymem.training.dist_env import DistEnv
from raymem.training.loop import _Session
from raymem.training.reporter import LocalReporter, Row

PAGE = Path(__file__).parents[1] / "docs" / "numerics.md"
LIMITS = {"losses": 1e-5, "weights": 1e-3}
"""Largest relative differences. Sums in another order differ by some 1e-7; an optimizer that divides by the root of a
tiny second moment, or takes a sign, makes more of it in some weights."""
LOSSY = ("loract",)
"""Methods that compress the activations of a micro-batch: on other workers lie other rows in one, and the result is
another draw. Only what leaves the micro-batches alone has a limit."""

PLAIN: dict[str, Any] = {
    "name": "run",
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0},
    "optimizer": {"lr": 1e-3},
    "loss": "full",
    "train": {"steps": 8, "global_batch": 8, "micro_batch": 2, "save_every": 8, "warmup": 0},
    "scaling": {"num_workers": 0},
    "tracking": "none",
}
METHODS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"adapter": "none"},
    "LoRA": {},
    "LoRAM": {"base": {"kind": "loram"}},
    "MoRAM": {"adapter": {"kind": "moram", "rank": 4, "density": 0.25}},
    "loract": {"activations": {"kind": "loract", "rank": 8}},
    "MLorc-AdamW": {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "rank": 4, "min_dim": 16, "lr": 1e-3}},
    "MLorc-Lion": {"adapter": "none", "optimizer": {"kind": "mlorc_lion", "rank": 4, "min_dim": 16, "lr": 1e-4}},
}
CHUNKED, CHECKPOINT = {"loss": "chunked"}, {"activations": "checkpoint"}


def layout(workers: int, strategy: str, *changes: dict[str, Any]) -> dict[str, Any]:
    return merged({"scaling": {"num_workers": workers, "strategy": strategy}}, *changes)


VARIANTS: dict[str, dict[str, Any]] = {
    "chunked loss": layout(0, "ddp", CHUNKED),
    "checkpointing": layout(0, "ddp", CHECKPOINT),
    "DDP, 2": layout(2, "ddp"),
    "DDP, 4": layout(4, "ddp"),
    "FSDP2, 1": layout(1, "fsdp2"),
    "FSDP2, 2": layout(2, "fsdp2"),
    "FSDP2, 4": layout(4, "fsdp2"),
    "DDP, 4, chunked, checkpointing": layout(4, "ddp", CHUNKED, CHECKPOINT),
    "FSDP2, 4, chunked, checkpointing": layout(4, "fsdp2", CHUNKED, CHECKPOINT),
}
KEEPS_MICRO_BATCHES = ("chunked loss", "FSDP2, 1")


def train(raws: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train recipes on this rank.

    Returns:
        For each the losses, the trained weights (whole, by name) and a digest of everything that ranks hold in common.
    """
    results = []
    for raw in raws:
        recipe = Recipe.model_validate(raw)
        rows: list[Row] = []
        session = _Session(
            recipe, DistEnv.current(recipe), run_storage(recipe), prepare_split(recipe, "train"), None,
            LocalReporter(rows.extend), (),
        )  # fmt: skip
        session.run()
        state = session.updater.state()
        sharded = session.dist_env.sharded
        weights = {name: whole(tensor) for name, tensor in state.items() if name.startswith("weights.")}
        # By FSDP2 a rank's optimizer state belongs to its own shard, so the weights stand for it.
        common = weights if sharded else {name: whole(tensor) for name, tensor in state.items()}
        results.append({
            "losses": [row["loss"] for row in rows],
            "weights": weights,
            "digest": digest(common, [[row["loss"], row["grad_norm"]] for row in rows]),
        })  # fmt: skip
    return results


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered from all ranks if it is sharded. Collective."""
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().clone().contiguous()


def digest(tensors: Mapping[str, torch.Tensor], numbers: Any) -> str:
    found = hashlib.sha256(json.dumps(numbers).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of any element, relative to the largest element of its tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-30))
        for name, value in expected.items()
    )


def compare(folder: Path) -> list[dict[str, Any]]:
    """Train everything; one row per method and variant."""
    model = save_tiny_model(folder / "model")
    write_examples(folder / "train.jsonl", 40, seed=0)
    prune_model(model, folder / "pruned", PruneOptions(layer_ratios=(0.5, 0.75), seed=1))

    def recipe(method: str, variant: str, changes: dict[str, Any]) -> dict[str, Any]:
        options = METHODS[method]
        if method == "LoRAM":
            options = {"base": {"kind": "loram", "artifact": str(folder / "pruned")}}
        plain = {key: value for key, value in PLAIN.items() if key not in options or key == "train"}
        places = {
            "model": {"name": str(model)},
            "data": {"train": str(folder / "train.jsonl"), "sequence_length": 32},
            "storage": {"path": str(folder / "runs" / f"{method} {variant}".replace(" ", "-").replace(",", ""))},
        }
        return parse_recipe(merged(plain, options, places, changes)).to_dict()

    jobs: dict[tuple[str, str], dict[str, Any]] = {}
    for method, options in METHODS.items():
        jobs[method, "reference"] = recipe(method, "reference", {})
        for variant, changes in VARIANTS.items():
            if "activations" in options and "activations" in changes:
                continue  # one way at a time to keep activations
            jobs[method, variant] = recipe(method, variant, changes)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for world in sorted({raw["scaling"]["num_workers"] for raw in jobs.values()}):
        ours = [key for key, raw in jobs.items() if raw["scaling"]["num_workers"] == world]
        ranks = in_processes(train, world, folder / "meet", [jobs[key] for key in ours])
        found |= {key: [rank[number] for rank in ranks] for number, key in enumerate(ours)}
        print(f"{len(ours)} runs on {max(1, world)} workers are done", flush=True)
    rows = []
    for (method, variant), ranks in found.items():
        if variant == "reference":
            continue
        (reference,) = found[method, "reference"]
        first = ranks[0]
        losses = max(
            abs(loss - expected) / abs(expected)
            for loss, expected in zip(first["losses"], reference["losses"], strict=True)
        )
        rows.append({
            "method": method,
            "variant": variant,
            "losses": losses,
            "weights": difference(first["weights"], reference["weights"]),
            "ranks_equal": len({rank["digest"] for rank in ranks}) == 1 if len(ranks) > 1 else None,
            "limited": method not in LOSSY or variant in KEEPS_MICRO_BATCHES,
        })  # fmt: skip
    return rows


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is above its limit, in words."""
    words = []
    for row in rows:
        name = f"{row['method']}, {row['variant']}"
        if row["limited"]:
            words += [f"{name}: {key} differ by {row[key]:.1e}, above {limit:.0e}" for key, limit in LIMITS.items()
                      if not row[key] <= limit]  # fmt: skip
        if row["ranks_equal"] is False:
            words.append(f"{name}: ranks hold different bits")
    return words


def page(rows: Sequence[dict[str, Any]]) -> str:
    """docs/numerics.md."""
    methods = list(METHODS)
    by_key = {(row["method"], row["variant"]): row for row in rows}

    def cell(method: str, variant: str) -> str:
        row = by_key.get((method, variant))
        if row is None:
            return "-"
        if not row["losses"] and not row["weights"]:
            return "0"
        star = "" if row["limited"] else " *"
        return f"{row['losses']:.0e} / {row['weights']:.0e}{star}"

    head = ["", *(method.replace("loract", "LoRAct") for method in methods)]
    lines = [head, ["---"] * len(head)]
    lines += [[variant, *(cell(method, variant) for method in methods)] for variant in VARIANTS]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    together = [row for row in rows if row["ranks_equal"] is not None]
    equal = sum(row["ranks_equal"] for row in together)
    return f"""# Numbers: what a layout changes

Made by `python benchmarks/parity.py` (figures: `benchmarks/results/parity.json`); do not edit by hand.

The same run of a tiny model, eight steps in fp32 on the CPU, in other layouts. Each cell has the largest relative
difference of a step's loss, and of a trained weight to the largest one of its tensor, from one process with the full
loss and nothing recomputed; 0 means bit for bit. The limits are {LIMITS["losses"]:.0e} for losses and
{LIMITS["weights"]:.0e} for weights: other layouts sum in another order, and optimizers that divide by a small root, or
take a sign, make more of it in single weights. A number behind DDP or FSDP2 is that of workers.

{table}

\\* LoRAct compresses the activations of a micro-batch together. Other workers put other rows into one, so that the
result is another draw of the same approximation; no limit is set there.

In {equal} of {len(together)} runs on several workers all ranks held the same bits in the end: losses, gradient norms
and weights, and under DDP also the optimizer's state.
"""


def main() -> int:
    provenance.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder))
    provenance.save("parity", {"limits": LIMITS, "rows": rows})
    PAGE.write_text(page(rows))
    words = failures(rows)
    for line in words:
        print(f"FAILED {line}")
    return 1 if words else 0


if __name__ == "__main__":
    sys.exit(main())

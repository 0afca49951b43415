"""Quality of every method and its peers on a real task: SmolLM2-135M-Instruct learns GSM8K (gsm8k.py).

Every line chooses among three learning rates, by the loss of 60 problems that are not trained on after a third of the
steps, on a seed of its own; then it trains from zero on each seed and is judged by 100 problems of the test split. Rows
stand in results/quality.jsonl; those that are there are not run again. One thread for each process; several may share
the work.

    python benchmarks/quality.py --data train.jsonl [--seeds 0 1 2] [--only LINE ...] [--part 0/2]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gsm8k
import peers
import provenance
import torch

from raymem.cli.console import hush_libraries

STEPS, TUNING_STEPS, TUNING_SEED = 24, 8, 100
MATCHED = 50
"""Problems that the trained model solves in writing."""
ADAPTER_RATES, SPARSE_RATES = (1e-3, 2e-3, 4e-3), (1e-3, 3e-3, 1e-2)
FULL_RATES, LION_RATES = (5e-5, 1e-4, 2e-4), (5e-6, 1e-5, 2e-5)


@dataclass(frozen=True)
class Line:
    """A method with the learning rates that it chooses among."""

    rates: tuple[float, ...]
    fragment: Mapping[str, Any] | None = None
    """Of a recipe; None for a peer."""
    peer: Callable[[Any], peers.Peer] | None = None
    quick: Mapping[str, Any] | None = None
    """The recipe's fragment for tuning, if it is another one that takes less time."""


def full(kind: str, **options: Any) -> Line:
    rates = LION_RATES if "lion" in kind else FULL_RATES
    return Line(rates, {"adapter": "none", "optimizer": {"kind": kind, **options}})


def lora(activations: Any = "none") -> Line:
    return Line(ADAPTER_RATES, {"adapter": "lora", "activations": activations})


def moram(criterion: str) -> Line:
    adapter = {"kind": "moram", "criterion": criterion, "rank": peers.RANK}
    return Line(SPARSE_RATES, {"adapter": adapter}, quick={"adapter": {**adapter, "selection_batches": 1}})


LINES: dict[str, Line] = {
    "LoRA": lora(),
    "full AdamW": full("adamw"),
    "MLorc-AdamW, rank 4": full("mlorc_adamw", rank=4),
    "MoRAM": moram("gradient"),
    "LoRAct, n/8": lora({"kind": "loract", "rank": 0.125}),
    "MLorc-AdamW, rank 32": full("mlorc_adamw", rank=32),
    "MLorc-Lion, rank 4": full("mlorc_lion", rank=4),
    "MLorc-Lion, rank 32": full("mlorc_lion", rank=32),
    "8-bit AdamW": Line(FULL_RATES, peer=peers.PEERS["8-bit AdamW"]),
    "GaLore": Line((1e-4, 3e-4, 1e-3), peer=peers.PEERS["GaLore"]),
    "APOLLO": Line((1e-4, 3e-4, 1e-3), peer=peers.PEERS["APOLLO"]),
    "LoRAct, n/4": lora({"kind": "loract", "rank": 0.25}),
    "LoRAct, n/8, linear layers": lora({"kind": "loract", "rank": 0.125, "scope": "linear"}),
    "VeLoRA": Line(ADAPTER_RATES, peer=peers.PEERS["VeLoRA"]),
    "MoRAM, random connections": moram("random"),
    "SHiRA": Line(SPARSE_RATES, peer=peers.PEERS["SHiRA"]),
    "Supertuning": Line(SPARSE_RATES, peer=peers.PEERS["Supertuning"]),
}


def row(data: Path, line: Line, lr: float, seed: int, *, tuning: bool) -> dict[str, Any]:
    """Train a line once."""
    fragment = (tuning and line.quick) or line.fragment or {}
    task = gsm8k.Task.of(gsm8k.raw_recipe(data, fragment, seed))
    model, step = gsm8k.ours(task) if line.peer is None else gsm8k.theirs(task, line.peer)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    facts = {"lr": lr, "seed": seed, "trained_parameters": trained}
    if tuning:
        task.fit(model, step, TUNING_STEPS, lr)
        return {**facts, "losses": task.losses(model, "tuning")}
    figures = task.fit(model, step, STEPS, lr)
    losses = task.losses(model, "answers", "text")
    return {**facts, **figures, "losses": losses, "exact_match": task.exact_match(model, MATCHED)}


def before(data: Path) -> dict[str, Any]:
    """Return the figures of the model that nothing has trained."""
    task = gsm8k.Task.of(gsm8k.raw_recipe(data, {"adapter": "none"}, 0))
    model, _ = gsm8k.ours(task)
    return {"losses": task.losses(model, "answers", "text"), "exact_match": task.exact_match(model, MATCHED)}


def main() -> None:
    parser = provenance.parser(__doc__, shared=True)
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of GSM8K, with test.jsonl beside it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES), metavar="LINE")
    asked = parser.parse_args()
    hush_libraries()
    torch.set_num_threads(1)
    provenance.entered("quality", "untrained", partial(before, asked.data))
    for name in asked.only[asked.part]:
        line = LINES[name]

        def trained(key: str, lr: float, seed: int, *, tuning: bool, line: Line = line) -> dict[str, Any]:
            work = partial(row, asked.data, line, lr, seed, tuning=tuning)
            return provenance.entered("quality", key, work)

        tuned = {
            lr: trained(f"{name} | tuning {lr:g}", lr, TUNING_SEED, tuning=True)["losses"]["tuning"]
            for lr in line.rates
        }
        best = min(tuned, key=tuned.__getitem__)
        for seed in asked.seeds:
            trained(f"{name} | seed {seed}, lr {best:g}", best, seed, tuning=False)


if __name__ == "__main__":
    main()

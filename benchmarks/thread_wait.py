"""Step time on the CPU by how idle OpenMP threads wait, on quiet cores and beside a busy process.

python benchmarks/thread_wait.py [--rounds 8] [--spins 1000 3000 10000]

``active``: they spin. ``passive``: they sleep at once. ``N``: they spin N times, then sleep (GOMP_SPINCOUNT).
``raymem``: what the command line sets, by what else the cores do when it starts (for load that comes later it is 10000
spins). One process per way, each stopped while it is not its turn; ratios are of the medians of paired rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import provenance
from turns import Contestant, in_turns

MODEL = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
SHAPES = ((1, 128), (2, 256))
"""Rows x tokens of a micro-batch of SmolLM2-135M's shape under LoRA."""
LOADS = ("quiet", "busy")
"""Busy: another process computes without end."""
WAYS: dict[str, dict[str, str]] = {"active": {"OMP_WAIT_POLICY": "ACTIVE"}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}


def serve() -> None:
    """Train for as many steps as standard input says, and answer with the seconds of each."""
    if os.environ.pop("AS_RAYMEM", None):
        from raymem.cli.threads import sleep_while_waiting, spin_on_quiet_cores

        sleep_while_waiting()
        spin_on_quiet_cores()
    import torch

    from raymem.recipe.schema import Recipe
    from raymem.training.data.batches import Batch
    from raymem.training.model.build import build_model
    from raymem.training.optim import build_updater
    from raymem.training.step import train_step

    raw = {
        "name": "wait", "model": {"config": MODEL, "tokenizer": "demo"}, "data": {"train": "demo:text"},
        "train": {"steps": 1, "precision": "fp32"},
    }  # fmt: skip
    recipe = Recipe.model_validate(raw)
    model = build_model(recipe)
    updater = build_updater(model, recipe)
    batches = []
    for rows, tokens in SHAPES:
        ids = torch.randint(MODEL["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        batches.append(Batch(ids, ids.clone(), None, None))
    number = 0
    print("{}", flush=True)
    for line in sys.stdin:
        shape, steps = json.loads(line)
        batch, seconds = batches[shape], []
        for _ in range(steps):
            began = time.perf_counter()
            train_step(model, [batch], len(batch.target_positions), updater, number, 1e-4, clip_norm=1.0)  # type: ignore[arg-type]
            seconds.append(time.perf_counter() - began)
            number += 1
        print(json.dumps(seconds), flush=True)


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of a turn; default: %(default)s")
    parser.add_argument("--spins", type=int, nargs="*", default=[1000, 3000, 10000])
    parser.add_argument("--loads", nargs="*", choices=LOADS, default=list(LOADS))
    parser.add_argument("--serve", action="store_true", help="what the processes of the benchmark run")
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return
    ways = {
        **WAYS,
        **{str(spins): {"GOMP_SPINCOUNT": str(spins)} for spins in asked.spins},
        "raymem": {"AS_RAYMEM": "1"},
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    found: dict[str, Any] = {}
    for load in asked.loads:
        busy = [] if load == "quiet" else [subprocess.Popen([sys.executable, "-c", "while True: pass"])]
        processes: dict[str, Contestant] = {}
        try:
            for name, environment in ways.items():
                processes[name] = Contestant(__file__, "--serve", environment={**kept, **environment})
            for shape, (rows, tokens) in enumerate(SHAPES):
                case = f"{rows} x {tokens}, {load}"
                found[case] = compare(processes, shape, asked.rounds, asked.steps)
                print(case, found[case], flush=True)
        finally:
            for process in [*busy, *(one.process for one in processes.values())]:
                process.kill()
    provenance.save("thread_wait", {"rounds": asked.rounds, "steps": asked.steps, "cases": found})


def compare(processes: dict[str, Contestant], shape: int, rounds: int, steps: int) -> dict[str, Any]:
    """Ask each in turn; seconds and ratios are medians."""
    in_turns(processes, [shape, 2], 1)
    seconds = in_turns(processes, [shape, steps], rounds)
    paired = {
        name: {
            f"over {other}": round(statistics.median(a / b for a, b in zip(found, seconds[other], strict=True)), 3)
            for other in ("active", "passive")
        }
        for name, found in seconds.items()
    }
    return {name: {"seconds": round(statistics.median(seconds[name]), 4), **ratios} for name, ratios in paired.items()}


if __name__ == "__main__":
    main()

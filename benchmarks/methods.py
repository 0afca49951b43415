"""Memory and speed of every method and of its peers, fine-tuning SmolLM2-135M on this machine.

    python benchmarks/methods.py [--rounds 5] [--only NAME ...]

A row is a method in a process of its own, in turns with one that trains plain LoRA under raymem: time is a ratio to
that. Methods of raymem are recipes, with the peak that `raymem plan` predicts; peers are run as their own users do
(peers.py). fp32, 2 rows of 256 random tokens, every token a target; one thread, whose CPU time counts, so that the
machine may be busy elsewhere. Rows stand in results/methods.jsonl; those that are there are not run again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import provenance
from turns import Contestant, in_turns, spread

BASELINE = "LoRA"
METHODS: dict[str, dict[str, Any]] = {
    BASELINE: {"adapter": "lora"},
    "LoRA, whole logits": {"adapter": "lora", "loss": "full"},
    "LoRA, checkpointing": {"adapter": "lora", "activations": "checkpoint"},
    "LoRAct, sublayers": {"adapter": "lora", "activations": {"kind": "loract", "rank": 0.125}},
    "LoRAct, linear layers": {"adapter": "lora", "activations": {"kind": "loract", "rank": 0.125, "scope": "linear"}},
    "LoRAM 0.5": {"adapter": "lora", "base": {"kind": "loram", "ratio": 0.5, "criterion": "magnitude"}},
    "MoRAM": {"adapter": {"kind": "moram", "selection_batches": 1}},
    "full AdamW": {"adapter": "none", "optimizer": "adamw"},
    "MLorc-AdamW, rank 4": {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "rank": 4}},
    "MLorc-AdamW, rank 32": {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "rank": 32}},
    "MLorc-Lion, rank 4": {"adapter": "none", "optimizer": {"kind": "mlorc_lion", "rank": 4}},
    "LoRAM 0.5, LoRAct": {
        "adapter": "lora",
        "base": {"kind": "loram", "ratio": 0.5, "criterion": "magnitude"},
        "activations": {"kind": "loract", "rank": 0.125},
    },
    "MoRAM, LoRAct": {
        "adapter": {"kind": "moram", "selection_batches": 1},
        "activations": {"kind": "loract", "rank": 0.125},
    },
    "MLorc-AdamW, checkpointing": {
        "adapter": "none",
        "optimizer": {"kind": "mlorc_adamw", "rank": 4},
        "activations": "checkpoint",
    },
}
ROWS, TOKENS = 2, 256
STORAGE = Path(tempfile.gettempdir()) / "raymem-benchmark-methods"


def recipe_of(name: str) -> Any:
    from raymem.recipe.load import recipe_of as checked
    from raymem.runs.resolve import resolve

    method = METHODS[name]
    raw = {
        **method,
        "name": "methods",
        "model": {"name": "smollm2"},
        "data": {"train": {"path": "demo:functions", "max_rows": 8}, "sequence_length": TOKENS, "packing": "wrapped"},
        "train": {"steps": 1, "global_batch": ROWS, "micro_batch": ROWS},
        "scaling": {"num_workers": 0},
        "storage": {"path": str(STORAGE)},
        "tracking": "none",
    }
    recipe = checked(raw)
    if "base" in method:
        from raymem.runs.loram.pipeline import Pipeline

        Pipeline(recipe).prune()
    return resolve(recipe).recipe


def serve(name: str) -> None:
    """Say what a method takes, then train for as many steps as each line of standard input says."""
    import torch

    from raymem.memory.meter import PeakMeter, resident_tensors

    ids = torch.randint(49152, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    facts, model, state, step = (theirs if name not in METHODS else ours)(name, ids)
    step()
    with PeakMeter(torch.device("cpu"), lambda: resident_tensors(model, [*state(), ids])) as meter:
        step()
    assert meter.peak is not None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    facts |= {
        "measured_bytes": meter.peak.allocated_bytes,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "artifact_bytes": sum(parameter.nbytes for parameter in trained),
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(json.loads(line)):
            began = time.process_time()
            step()
            seconds.append(time.process_time() - began)
        print(json.dumps(seconds), flush=True)


def ours(name: str, ids: Any) -> Any:
    import raymem
    from raymem.training.data.batches import Batch
    from raymem.training.hooks import hooks_of, view_of
    from raymem.training.model.build import build_model
    from raymem.training.optim import build_updater
    from raymem.training.step import train_step

    recipe = recipe_of(name)
    plan = raymem.plan(recipe)
    model = build_model(recipe)
    updater = build_updater(model, recipe)
    batch = Batch(ids, ids.clone(), None, None)
    assert batch.target_positions is not None
    targets = len(batch.target_positions)
    view = view_of(model, lambda _: [(batch, targets)], mixed=False)
    for hook in hooks_of(recipe, model):
        hook.before_step(0, view)
    number = iter(range(10**9))

    def step() -> None:
        train_step(model, [batch], targets, updater, next(number), 1e-4, clip_norm=1.0)

    def state() -> Iterator[Any]:
        yield from updater.state().values()
        yield from (t for t in (batch.labels, batch.target_positions) if t is not None)

    return {"predicted_bytes": plan.step_peak_bytes, "predicted_terms": plan.terms}, model, state, step


def theirs(name: str, ids: Any) -> Any:
    import torch
    from peers import PEERS
    from transformers import AutoModelForCausalLM

    from raymem.recipe.schema import ModelSection
    from raymem.training.model.smollm2 import located

    directory = located(ModelSection(name="smollm2"), STORAGE / "cache").name
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.train()
    peer = PEERS[name](model)
    return {}, peer.model, lambda: list(peer.state()), lambda: peer.step(ids)


def row(name: str, rounds: int) -> dict[str, Any]:
    """Return a method's figures; its steps and those of the baseline take turns."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    pair = {one: Contestant(__file__, "--serve", one, environment=environment) for one in {name: 0, BASELINE: 0}}
    try:
        in_turns(pair, 1, 1)
        seconds = in_turns(pair, 2, rounds)
    finally:
        for contestant in pair.values():
            contestant.end()
    ratios = [a / b for a, b in zip(seconds[name], seconds[BASELINE], strict=True)]
    return {
        "peer": name not in METHODS,
        "rounds": rounds,
        **pair[name].facts,
        "tokens_per_s": spread([ROWS * TOKENS / one for one in seconds[name]]),
        "time_over_lora": spread(ratios),
    }


def main() -> None:
    from peers import PEERS

    parser = provenance.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*METHODS, *PEERS], default=[*METHODS, *PEERS], metavar="NAME")
    parser.add_argument("--serve", help="what the processes of the benchmark run")
    asked = parser.parse_args()
    if asked.serve is not None:
        serve(asked.serve)
        return
    for name in asked.only:
        provenance.entered("methods", name, partial(row, name, asked.rounds))


if __name__ == "__main__":
    main()

"""Which method fits which GPU: predicted memory of popular models under methods from exact to most frugal.

Plans alone: no weights, no network, no GPU. One row of 2048 tokens a forward pass, bf16; memory is what a GPU must
have, its CUDA context included. A plan that is made is kept (results/parts/).

    python benchmarks/choosing.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import provenance

MODELS = (
    "meta-llama/Llama-3.2-1B",
    "Qwen/Qwen3-4B",
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.1-70B",
)
LORA: dict[str, Any] = {"adapter": "lora", "optimizer": "adamw"}
CHECKPOINT = {"activations": "checkpoint"}
LORACT = {"activations": {"kind": "loract", "rank": 0.125}}
WAYS: dict[str, dict[str, Any]] = {
    "full AdamW, checkpointing": {"adapter": "none", "optimizer": "adamw", **CHECKPOINT},
    "full MLorc-AdamW, checkpointing": {"adapter": "none", "optimizer": "mlorc_adamw", **CHECKPOINT},
    "LoRA": LORA,
    "LoRA, LoRAct": {**LORA, **LORACT},
    "LoRA, checkpointing": {**LORA, **CHECKPOINT},
    "QLoRA, checkpointing": {**LORA, **CHECKPOINT, "base": {"quantize": "nf4"}},
    "QLoRAM 0.65, checkpointing": {**LORA, **CHECKPOINT, "base": {"kind": "loram", "ratio": 0.65, "quantize": "nf4"}},
    "QLoRAM 0.85, checkpointing": {**LORA, **CHECKPOINT, "base": {"kind": "loram", "ratio": 0.85, "quantize": "nf4"}},
}
"""In the order in which one gives way to the next."""
TOKENS = 2048
CONSTANTS = "A100-80GB"
"""The GPU whose context and workspaces are counted; those of others differ by 0.2 GiB at most."""
GPUS = ("T4", "L4", "RTX4090", "A100-40GB", "L40S", "A100-80GB", "H200")


def main() -> None:
    from raymem.memory.devices import gpu_named
    from raymem.planner import Planner

    provenance.parser(__doc__).parse_args()
    with Planner(gpu=CONSTANTS) as planner:
        rows = [
            {
                "model": model,
                "way": way,
                **provenance.kept(f"choosing-{model}-{way}", partial(row, planner, model, way)),
            }
            for model in MODELS
            for way in WAYS
        ]
    capacities = {gpu: gpu_named(gpu).capacity_bytes for gpu in GPUS}
    provenance.save("choosing", {"tokens": TOKENS, "gpus": capacities, "rows": rows})


def row(planner: Any, model: str, way: str) -> dict[str, Any]:
    """Plan a model under one method."""
    from raymem.errors import RaymemError
    from raymem.recipe.load import recipe_of

    raw = {
        "name": "choosing",
        "model": {"name": model},
        "data": {"train": "demo:text", "sequence_length": TOKENS, "packing": "wrapped"},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1, "precision": "bf16"},
        "scaling": {"num_workers": 1, "use_gpu": True},
        **WAYS[way],
    }
    case = {"model": model, "way": way}
    try:
        plan = planner.plan(recipe_of(raw))
    except RaymemError as error:
        return {**case, "refused": str(error)}
    assert plan.traced, plan.note
    return {**case, "capacity_bytes": plan.capacity_bytes, "terms": plan.terms}


if __name__ == "__main__":
    main()

"""Search space over the methods themselves: which of them to use at all, and how strongly, under one budget.

It starts from a recipe with ``optimizer: adamw``, whatever its other axes are; what an axis is set to here begins with
that kind's defaults. (The optimizer is chosen for full fine-tuning alone: adapters keep the recipe's own, and an MLorc
one goes with none of them.) Dimensions of a method exist only where it is chosen. MLorc goes with full fine-tuning
alone, since the factors of an adapter are of low rank already; a base in 4 bits or a pruned one goes with adapters
alone, since it is frozen. Full fine-tuning wants a learning rate of its own, so it has one.

LoRAM (``base.kind: loram``) is left to its own space: a pruned model is made per ratio, which is minutes on a large
one.
"""

from __future__ import annotations

from typing import Any

ADAPTERS = {"adapter.kind": ["lora", "moram"]}

SPACE: dict[str, dict[str, Any]] = {
    "adapter.kind": {"type": "choice", "choices": ["none", "lora", "moram"]},
    "adapter.rank": {"type": "choice", "choices": [4, 8, 16, 32, 64], "when": ADAPTERS},
    "adapter.density": {
        "type": "choice", "choices": [0.01, 0.03, 0.1], "when": {"adapter.kind": ["moram"]},
    },
    "activations.kind": {"type": "choice", "choices": ["none", "checkpoint", "loract"]},
    "activations.scope": {
        "type": "choice", "choices": ["layer", "sublayer"], "when": {"activations.kind": ["loract"]},
    },
    "activations.rank": {
        "type": "choice", "choices": [1 / 16, 1 / 8, 1 / 4], "when": {"activations.kind": ["loract"]},
    },
    "optimizer.kind": {
        "type": "choice", "choices": ["adamw", "mlorc_adamw"], "when": {"adapter.kind": ["none"]},
    },
    "optimizer.rank": {
        "type": "choice", "choices": [4, 8, 16, 32], "when": {"optimizer.kind": ["mlorc_adamw"]},
    },
    "optimizer.lr": {"type": "float", "low": 1e-4, "high": 2e-2, "log": True},
    "train.micro_batch": {"type": "choice", "choices": [1, 2, 4]},
}  # fmt: skip

"""Search space of MLorc over paths of a recipe with ``adapter: none`` and ``optimizer: {kind: mlorc_adamw}``.

Rank is what the optimizer holds: r (m + n) numbers per moment of an m x n matrix; 4 is the paper's choice, and beyond
32 there is little left to gain. The root space needs no repair of negative entries and is a little faster. The learning
rate is searched beside them: it is that of full fine-tuning, not LoRA's.
"""

from __future__ import annotations

from typing import Any

SPACE: dict[str, dict[str, Any]] = {
    "optimizer.lr": {"type": "float", "low": 1e-5, "high": 3e-3, "log": True},
    "optimizer.rank": {"type": "choice", "choices": [2, 4, 8, 16, 32]},
    "optimizer.second_moment": {"type": "choice", "choices": ["raw", "sqrt"]},
    "optimizer.weight_decay": {"type": "float", "low": 0.0, "high": 0.1, "log": False},
}

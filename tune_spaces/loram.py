"""Search space of LoRAM: how much of the base may go, by which criterion, and how fast the adapter then learns.

The ratio buys memory with quality; up to a half little is lost, far above it the adapter learns for a model that the
full one no longer resembles. Random units are a real choice: on large models the paper finds them as good as scored
ones, and they need no calibration. A pruned model is made once per ratio, criterion and seed, by the first trial that
wants it, and found again by later ones.
"""

from __future__ import annotations

from typing import Any

SPACE: dict[str, dict[str, Any]] = {
    "base.ratio": {"type": "choice", "choices": [0.25, 0.5, 0.65, 0.75]},
    "base.criterion": {"type": "choice", "choices": ["random", "magnitude", "taylor", "wanda"]},
    "adapter.rank": {"type": "choice", "choices": [8, 16, 32, 64]},
    "optimizer.lr": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
}

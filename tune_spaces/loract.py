"""Search space of LoRAct: how much error in the gradient buys how much activation memory.

Memory falls in proportion to ``rank``; ``sublayer`` holds about twice as much as ``layer`` at the same rank but
comes closer to the exact gradient, and a power iteration comes closer for two more matrix products per tensor.
``first_input`` stays raw: embeddings are not of low rank. The learning rate belongs in the same
search, because a noisier gradient wants a smaller one.
"""

from __future__ import annotations

from typing import Any

SPACE: dict[str, dict[str, Any]] = {
    "activations.rank": {"type": "float", "low": 1 / 32, "high": 0.5, "log": True},
    "activations.scope": {"type": "choice", "choices": ["layer", "sublayer"]},
    "activations.power_iterations": {"type": "int", "low": 0, "high": 2},
    "optimizer.lr": {"type": "float", "low": 1e-5, "high": 1e-2, "log": True},
}

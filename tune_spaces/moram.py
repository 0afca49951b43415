"""Search space of MoRAM over paths of a recipe with ``adapter: {kind: moram}``.

The learning rate reaches higher than LoRA's: a masked product moves few weights, each of them further. Density and rank
trade places only in part: rank is what trains and what the optimizer holds, density is how much of the product counts
and costs indices and time. Alpha is left at its default, since Adam's step makes it a second learning rate.
"""

SPACE = {
    "optimizer.lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True},
    "adapter.rank": {"type": "choice", "choices": [4, 8, 16, 32]},
    "adapter.density": {"type": "float", "low": 0.005, "high": 0.25, "log": True},
    "adapter.selection_batches": {"type": "choice", "choices": [1, 4, 8, 16]},
    "adapter.criterion": {"type": "choice", "choices": ["gradient", "absolute_gradient"]},
}

"""Shared by tests of what lies on the host: tiny models, their gradients, and a host whose memory no meter sees."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from raymem.planner.types import Target
from raymem.recipe.schema import Recipe
from tests.helpers.support import FAMILIES, make_recipe

GPU = Target("cuda", 1)
"""A plan for it tells the memory of the device from that of the host."""


def tiny(family: str, *fragments: dict[str, Any]) -> Recipe:
    config = {**FAMILIES[family], "n_layer" if family == "gpt2" else "num_hidden_layers": 4}
    model = {"name": None, "config": config, "tokenizer": "demo"}
    return make_recipe({"model": model}, *fragments)


def gradients(model: nn.Module, passes: int = 2) -> list[torch.Tensor]:
    """Loss and gradients of rows, summed over passes."""
    losses = []
    for seed in range(passes):
        ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) > 2
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class HiddenHost:
    """Memory of the host from NumPy, which torch's profiler does not see, so that it counts what is the device's."""

    def __init__(self) -> None:
        self.alive = self.most = 0

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = numel * dtype.itemsize
        array = np.empty(size + 64, dtype=np.uint8)
        start = -array.ctypes.data % 64
        self._add(size)
        weakref.finalize(array, self._add, -size)
        return torch.from_numpy(array[start : start + size]).view(dtype)

    def _add(self, size: int) -> None:
        self.alive += size
        self.most = max(self.most, self.alive)

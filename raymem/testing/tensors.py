"""Comparisons of many named tensors, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def snapshot(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies that later steps leave alone."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter that is not trained, and every buffer."""
    parameters = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {**parameters, **dict(model.named_buffers())}


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal names and bitwise equal values; NaNs equal themselves."""
    assert set(actual) == set(expected)
    different = [name for name in actual if not torch.equal(_bits(actual[name]), _bits(expected[name]))]
    assert not different, f"{len(different)} of {len(actual)} tensors differ: {different[:3]}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

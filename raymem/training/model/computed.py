"""Recomputes what no checkpoint holds: buffers that the modules of a model compute from its config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from raymem.errors import ModelError


def restore_computed_buffers(base_model: Any, filled: Sequence[torch.Tensor]) -> None:
    """Recompute buffers that no checkpoint holds (rotary frequencies, embedding scales) through transformers' own rule.

    transformers initialises what is not flagged; so everything that was just loaded is flagged, and of the modules
    only those that own such buffers are visited. A buffer that its own module leaves alone is that of a module around
    it to fill.

    Args:
        filled: tensors of an adapter, which have their values.

    Raises:
        ModelError: nothing fills one of them.
    """
    for tensor in [*base_model.parameters(), *base_model.buffers()]:
        tensor._is_hf_initialized = True
    computed = {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in base_model.named_modules()
        for name in module._non_persistent_buffers_set
        if getattr(module, name) is not None and not any(getattr(module, name) is tensor for tensor in filled)
    }
    visited = {name.rpartition(".")[0] for name in computed}
    for name in computed:
        buffer = base_model.get_buffer(name)
        buffer._is_hf_initialized = False
        buffer.fill_(_untouched(buffer))
    _initialise(base_model, visited)
    left = [name for name in computed if _is_untouched(base_model.get_buffer(name))]
    if left:
        around = {".".join(name.split(".")[:end]) for name in left for end in range(name.count("."))}
        _initialise(base_model, around - visited)
        left = [name for name in left if _is_untouched(base_model.get_buffer(name))]
    if left:
        raise ModelError(
            f"model: {type(base_model).__name__} computes {left[0]} in a way that transformers does not repeat after "
            "loading, so that it would hold no value; load and save the model with a class that transformers ships"
        )


def _initialise(base_model: Any, paths: set[str]) -> None:
    """Run transformers' initialisation of some modules; it leaves out what is flagged."""
    for path, module in base_model.named_modules():
        module._is_hf_initialized = path not in paths
    base_model.initialize_weights()


def _untouched(buffer: torch.Tensor) -> float | int | bool:
    """Return a value that no computed buffer is full of."""
    if buffer.dtype == torch.bool:
        return False
    return math.nan if buffer.is_floating_point() or buffer.is_complex() else torch.iinfo(buffer.dtype).min


def _is_untouched(buffer: torch.Tensor) -> bool:
    if buffer.dtype == torch.bool or not buffer.numel():
        return False
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().all())
    return bool((buffer == torch.iinfo(buffer.dtype).min).all())

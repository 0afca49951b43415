"""Spreads the model of an artefact over workers by FSDP2: no process ever holds the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from raymem.training.dist_env import DistEnv, shard
from raymem.training.model import weights
from raymem.training.model.adapter import tensors_of
from raymem.training.model.computed import restore_computed_buffers


def spread(
    base_model: Any, source: weights.TensorSource, dist_env: DistEnv, *,
    attach: Callable[[Any], Any] = lambda base_model: base_model,
    fill: Callable[[Any, Sequence[str]], None] = lambda model, added: None,
) -> Any:  # fmt: skip
    """Return the model with its values, sharded and in evaluation mode. Collective.

    Args:
        base_model: a bare transformers model on the meta device.
        source: of its tensors, of which each rank reads its own rows.
        attach: puts an adapter on it, without values.
        fill: gives the adapter its values, once the base has its own; gets the model and the names of what
            ``attach`` has added.

    Raises:
        ModelError: see :func:`raymem.training.model.weights.fill`.
    """
    places, tied = weights.slots(base_model), weights.tied_names(base_model)
    blocks = blocks_of(base_model)
    of_base = {id(tensor) for tensor in tensors_of(base_model).values()}
    model: nn.Module = attach(base_model)
    added = [name for name, tensor in tensors_of(model).items() if id(tensor) not in of_base]
    shard(model, blocks, dist_env)
    weights.materialise(model, dist_env)
    weights.fill(places, source, dist_env, tied)
    fill(model, added)
    restore_computed_buffers(base_model, [tensor for name, tensor in tensors_of(model).items() if name in added])
    return model.eval()


def blocks_of(base_model: Any) -> list[nn.Module]:
    """Return the transformer blocks of a bare model, each of which is a unit of FSDP2."""
    return [m for m in base_model.modules() if type(m).__name__ in (base_model._no_split_modules or ())]

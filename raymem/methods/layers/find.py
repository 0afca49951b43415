"""Finds the transformer layers of a model."""

from __future__ import annotations

import sys

from torch import nn


def transformer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> transformer layer of transformers or torch, outermost ones only, in the order of the model."""
    return outermost({name: module for name, module in model.named_modules() if isinstance(module, _layer_types())})


def outermost(named: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Leave out the modules that lie inside others of them."""

    def is_inner(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in named for end in range(1, len(parts)))

    return {name: module for name, module in named.items() if not is_inner(name)}


def _layer_types() -> tuple[type[nn.Module], ...]:
    """A model can only have layers of transformers if that has been imported."""
    layers = sys.modules.get("transformers.modeling_layers")
    theirs = (layers.GradientCheckpointingLayer,) if layers else ()
    return (*theirs, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

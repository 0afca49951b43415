"""Finds the transformer layers of a model, and the modules inside, whose activations are compressed."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from raymem.errors import ModelError
from raymem.methods.layers.find import outermost, transformer_layers


def find_layers(model: nn.Module, layers: str | nn.ModuleList | None) -> dict[str, nn.Module]:
    """Name -> transformer layer, outermost ones only, in the order of the model.

    Args:
        layers: regular expression for whole module names, the layers themselves, or None for the known layer types
            (``GradientCheckpointingLayer`` of transformers, ``TransformerEncoderLayer``/``DecoderLayer`` of torch).

    Raises:
        ModelError: nothing was found.
    """
    names = {module: name for name, module in model.named_modules()}
    if isinstance(layers, nn.ModuleList):
        foreign = [layer for layer in layers if layer not in names]
        if foreign or not len(layers):
            what = f"a {type(foreign[0]).__name__} that is no part of the model" if foreign else "no layer"
            raise ModelError(f"layers: the list holds {what}; give a non-empty ModuleList of {type(model).__name__}")
        return {names[layer]: layer for layer in layers}
    if layers is not None:
        matching = {name: module for module, name in names.items() if re.fullmatch(layers, name)}
        if not matching:
            near = difflib.get_close_matches(layers, names.values(), n=3, cutoff=0.3)
            raise ModelError(
                f"layers: {layers!r} matches no module of {type(model).__name__}; near names: {', '.join(near)}"
            )
        return outermost(matching)
    known = transformer_layers(model)
    if not known:
        raise ModelError(
            f"layers: no transformer layers were found in {type(model).__name__}, so nothing would be compressed; "
            "name them with layers= (a regular expression such as 'blocks\\.\\d+', or a ModuleList)"
        )
    return known


def first_of_each_stack(layers: dict[str, nn.Module]) -> set[str]:
    """Return the names of the layers that see embeddings: the first one below each parent module."""
    firsts: dict[str, str] = {}
    for name in layers:
        firsts.setdefault(name.rpartition(".")[0], name)
    return set(firsts.values())


def hidden_size(name: str, layer: nn.Module) -> int:
    """Input features of the first linear map of a layer.

    Raises:
        ModelError: it has none.
    """
    for module in layer.modules():
        features = getattr(module, "in_features", None) or getattr(module, "embed_dim", None)
        if isinstance(features, int):
            return features
        if isinstance(module, conv1d_types()):
            weight: Any = module.weight
            return int(weight.shape[0])
    raise ModelError(
        f"layers: {name} ({type(layer).__name__}) holds no linear layer, so its hidden size is unknown; "
        "choose whole transformer layers"
    )


def linear_modules(name: str, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return (name, module) of every linear layer inside a transformer layer."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *conv1d_types())
    for inner, module in layer.named_modules(prefix=name):
        if isinstance(module, kinds):
            yield inner, module


def sublayers(name: str, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return (name, child) of the direct children; for a list that only holds others, theirs (T5 nests so)."""
    for inner, child in layer.named_children():
        full = f"{name}.{inner}" if name else inner
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from sublayers(full, child)
        else:
            yield full, child


def has_matrices(module: nn.Module) -> bool:
    """Say whether recomputing this module spares more than it costs to hold its input."""
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def routes_tokens(module: nn.Module) -> bool:
    """Say whether this is, or contains, a mixture of experts (in transformers it has a member ``experts``)."""
    return any("experts" in inner._modules or "Experts" in type(inner).__name__ for inner in module.modules())


def conv1d_types() -> tuple[type[nn.Module], ...]:
    """Return the classes with which GPT-2 writes its linear layers."""
    utilities = sys.modules.get("transformers.pytorch_utils")
    return (utilities.Conv1D,) if utilities else ()

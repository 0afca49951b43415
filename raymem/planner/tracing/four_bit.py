"""Puts stand-ins in the place of bitsandbytes' 4-bit layers in the copy of a model that a plan runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raymem.errors import PlanError
from raymem.memory import nf4

_HOOKS = ("hooks", "hooks_with_kwargs", "hooks_always_called")
"""The ends of the attributes in which torch keeps the hooks of a module."""


def put_stand_ins(model: nn.Module) -> None:
    """Replace each 4-bit layer of a model on the meta device by one of :mod:`raymem.memory.nf4`, with its hooks.

    Raises:
        PlanError: weights in 4 bits without double quantisation, of which a plan knows no bytes.
    """
    for name, module in list(model.named_modules()):
        if not nf4.is_4bit(module) or isinstance(module, nf4.Linear4bit) or _is_wrapper(module):
            continue
        layer: Any = module
        state = layer.weight.quant_state
        if state is None or not state.nested:
            raise PlanError(
                f"{name}: its 4-bit weight is not doubly quantised, which plans do not know; load the model with "
                "bnb_4bit_use_double_quant=True, or leave budget out"
            )
        dtype = layer.compute_dtype or state.dtype
        stand_in: Any = nf4.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, dtype)
        weight = torch.empty(layer.out_features, layer.in_features, dtype=state.dtype, device="meta")
        stand_in.weight = nf4.Params4bit(weight, requires_grad=False)
        stand_in.bias = layer.bias
        vars(stand_in).update({key: value for key, value in vars(layer).items() if key.endswith(_HOOKS)})
        stand_in.train(layer.training)
        model.set_submodule(name, stand_in)


def _is_wrapper(module: nn.Module) -> bool:
    """Say whether a module is PEFT's around a 4-bit layer, which goes by the same name."""
    return hasattr(module, "base_layer")

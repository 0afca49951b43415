"""Gives modules of a model the lean forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raymem.methods.layers.gated_mlp import is_gated_mlp
from raymem.methods.layers.norms import NormForm, recognise
from raymem.training.lean.forwards import LeanLora, LeanMlp, LeanNorm


def install(model: nn.Module) -> None:
    """Give the modules of a complete model (wrapped by PEFT, on whatever device) their lean forward passes.

    Modules are known by trying their class out, so that any family has them; others stay as they are.
    """
    forms: dict[Any, NormForm | None] = {}
    for module in model.modules():
        if _is_lora_linear(module):
            module.forward = LeanLora(module)
        elif is_gated_mlp(module):
            module.forward = LeanMlp(module)
        else:
            form = _norm_form(module, forms)
            if form is not None:
                module.forward = LeanNorm(module, form)


def _is_lora_linear(module: nn.Module) -> bool:
    """Say whether a module is PEFT's wrapper of a linear layer, plain or in 4 bits, without an import of PEFT."""
    kind = type(module)
    return kind.__module__.startswith("peft.tuners.lora.") and kind.__name__ in ("Linear", "Linear4bit")


def _norm_form(module: nn.Module, known: dict[Any, NormForm | None]) -> NormForm | None:
    """Return the formula of a norm; modules of one class with the same settings are tried out once."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or module._modules:
        return None
    settings = sorted((k, v) for k, v in module.__dict__.items() if isinstance(v, int | float | str))
    key = (type(module), tuple(weight.shape), *settings)
    if key not in known:
        known[key] = recognise(module, weight.shape[0])
    return known[key]

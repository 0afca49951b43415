"""Replacements for a module's ``forward``; each passes on to the stock one the inputs that it was not made for."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from raymem.methods.layers.norms import NormForm
from raymem.training.lean.functions import GateFunction, LoraFunction, NormFunction
from raymem.training.lean.nf4 import Weight


class Lean:
    """The base of the replacements: an object, so that it is copied and pickled with its module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner = module.forward
        self.__signature__ = inspect.signature(self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and not _autocast(args[0]):
            output = self.run(args[0])
            if output is not None:
                return output
        return self.inner(*args, **kwargs)

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the output, or None where the stock pass is needed."""
        raise NotImplementedError


class LeanNorm(Lean):
    """RMSNorm or LayerNorm that keeps its input."""

    def __init__(self, module: nn.Module, form: NormForm) -> None:
        super().__init__(module)
        self._form = form

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        weight, bias = self.module._parameters.get("weight"), self.module._parameters.get("bias")
        if isinstance(weight, DTensor) or isinstance(x, DTensor):
            return None
        return NormFunction.apply(x, weight, bias, self._form, self.inner)  # type: ignore[no-untyped-call,no-any-return]


class LeanMlp(Lean):
    """SiLU-gated MLP that keeps gate and up projection."""

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        module: Any = self.module
        gate, up = module.gate_proj(x), module.up_proj(x)
        down = module.down_proj.__dict__.get("forward")
        # It is not called itself there, so that hooks of it would not run.
        hooked = module.down_proj._forward_pre_hooks or module.down_proj._forward_hooks
        output: torch.Tensor | None = down.gated(gate, up) if isinstance(down, LeanLora) and not hooked else None
        if output is None:
            output = module.down_proj(GateFunction.apply(gate, up))  # type: ignore[no-untyped-call]
        return output


class LeanLora(Lean):
    """PEFT's LoRA of a linear layer."""

    def run(self, x: torch.Tensor) -> torch.Tensor | None:
        return self._apply(x, None)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
        """Apply the layer to ``silu(gate) * up``."""
        return self._apply(gate, up)

    def _apply(self, x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor | None:
        layer: Any = self.module
        active = layer.active_adapters
        if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
            return None
        name = active[0]
        down, above, drop = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        weight = Weight.of(layer.base_layer, x.dtype)
        plain = name not in layer.lora_variant and down.bias is None and above.bias is None
        matrices = (down.weight, above.weight)
        same = all(m.dtype == x.dtype and not isinstance(m, DTensor) for m in matrices)
        if weight is None or not plain or not same or x.numel() == 0:
            return None
        rate = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        return LoraFunction.apply(  # type: ignore[no-untyped-call,no-any-return]
            x, up, *matrices, weight.dense, weight, layer.scaling[name], rate
        )


def _autocast(x: torch.Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)

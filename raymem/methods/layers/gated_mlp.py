"""SiLU-gated MLPs that keep gate and up projection compressed, and nothing else of their width.

Stock autograd keeps four tensors of the inner width: the gate (for SiLU), ``silu(gate)`` and ``up`` (for the product),
and the product (for the down projection). All of them follow from gate and up: with ``h = silu(g) u``

    dL/du = dL/dh silu(g),   dL/dg = dL/dh u silu'(g)

and the down projection's input is made anew from the same two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from raymem.methods.layers.saved import Raw, Saved

# T tokens (all leading dimensions), N inner features

_MEMBERS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class GateFunction(torch.autograd.Function):
    """``act(gate) * up`` as the module computes it, with the backward pass of SiLU from two held tensors.

    ``forward(gate, up, act, save)``: ``save(gate, up, product)`` holds them and returns two things with ``unpack()``
    and whatever must live as long as they do.
    """

    @staticmethod
    def forward(ctx: Any, gate_TN: torch.Tensor, up_TN: torch.Tensor, act: Any, save: Any) -> torch.Tensor:
        product_TN: torch.Tensor = act(gate_TN) * up_TN
        ctx.saved = save(gate_TN, up_TN, product_TN)
        return product_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, _ = ctx.saved
        ctx.saved = None
        gate_TN = gate.unpack()
        grad_up = grad_TN * F.silu(gate_TN) if ctx.needs_input_grad[1] else None
        grad_gate = None
        if ctx.needs_input_grad[0]:
            grad_gate = torch.ops.aten.silu_backward(grad_TN * up.unpack(), gate_TN)
        return grad_gate, grad_up, None, None


def is_gated_mlp(module: nn.Module) -> bool:
    """Say whether a module computes ``down_proj(silu(gate_proj(x)) * up_proj(x))``, found by trying its class out.

    The projections are replaced by small ones for that, so that it does not matter what and where they are.
    """
    members = {name for name in _MEMBERS if hasattr(module, name)}
    if members != _MEMBERS or set(module._modules) - _MEMBERS or module._parameters or module._buffers:
        return False
    source = torch.Generator().manual_seed(0)
    gate, up = (_small_linear(6, 10, source) for _ in range(2))
    down = _small_linear(10, 6, source)
    probe = object.__new__(type(module))
    inner = {**module._modules, "gate_proj": gate, "up_proj": up, "down_proj": down}
    probe.__dict__ = {**module.__dict__, "_modules": inner}
    probe.__dict__.pop("forward", None)
    x = torch.cat([scale * torch.randn(3, 6, generator=source) for scale in (1, 100)])  # some clamp what is large
    with torch.enable_grad():
        try:
            stock = type(probe).forward(probe, x)
            expected = torch.autograd.grad(stock.sum(), [gate.weight, up.weight])
        except Exception:  # whatever another class does with such an input
            return False
        product = GateFunction.apply(gate(x), up(x), module.act_fn, _hold)  # type: ignore[no-untyped-call]
        ours = down(product)
        gradients = torch.autograd.grad(ours.sum(), [gate.weight, up.weight])
    return torch.equal(ours, stock) and all(map(torch.allclose, gradients, expected))


def _small_linear(inputs: int, outputs: int, source: torch.Generator) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.randn(outputs, inputs, generator=source))
    return linear


def _hold(gate_TN: torch.Tensor, up_TN: torch.Tensor, _: torch.Tensor) -> tuple[Saved, Saved, None]:
    return Saved(Raw(gate_TN), gate_TN.shape), Saved(Raw(up_TN), up_TN.shape), None

"""RMSNorm and LayerNorm that keep their compressed output for backward instead of their input.

The next operation keeps that same output, so one compression serves both. With ``y = x_hat (w + o) + b`` and
``x_hat = (x - mean) / std`` (no mean for RMSNorm), the normalised input is had back from the output and

    dL/dx = (g - mean(g x_hat) x_hat - mean(g)) / std,   g = dL/dy (w + o)

where the last mean is LayerNorm's only. ``1/std`` is kept exactly: one number per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from raymem.methods.layers.saved import Raw, Saved

# T tokens (all leading dimensions), N features, 1 a kept dimension

_PROBE_TOKENS = 4


@dataclass(frozen=True)
class NormForm:
    """Which formula a norm computes."""

    centred: bool
    """LayerNorm takes the mean off, RMSNorm does not."""
    offset: float
    """Added to the weight; 1 in Gemma."""
    eps: float


class NormFunction(torch.autograd.Function):
    """The module's own forward pass, with a backward pass from the output.

    ``forward(x, weight, bias, form, compute, save)``: ``compute(x)`` is the stock forward pass; ``save(y)`` holds the
    output and returns something with ``unpack()``.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, form: NormForm, compute: Any, save: Any) -> torch.Tensor:
        with torch.no_grad():
            y: torch.Tensor = compute(x)
            rstd_T1 = _rstd(x.detach(), form)
        ctx.saved, ctx.form, ctx.x_dtype = save(y), form, x.dtype
        ctx.save_for_backward(weight, bias, rstd_T1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, bias, rstd_T1 = ctx.saved_tensors
        x_hat_TN = _normalised(ctx.saved.unpack().float(), weight, bias, ctx.form)
        ctx.saved = None
        grad = grad_TN.float()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            inner_TN = grad if weight is None else grad * (weight.float() + ctx.form.offset)
            grad_x = inner_TN - x_hat_TN * (inner_TN * x_hat_TN).mean(-1, keepdim=True)
            if ctx.form.centred:
                grad_x -= inner_TN.mean(-1, keepdim=True)
            grad_x = (grad_x * rstd_T1).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * x_hat_TN).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def _rstd(x_TN: torch.Tensor, form: NormForm) -> torch.Tensor:
    """Return 1/std [T, 1], fp32."""
    if form.centred:
        variance_T1 = torch.var(x_TN.float(), -1, correction=0, keepdim=True)
    else:
        variance_T1 = torch.linalg.vector_norm(x_TN, dim=-1, keepdim=True, dtype=torch.float32).square()
        variance_T1 = variance_T1 / x_TN.shape[-1]
    return torch.rsqrt(variance_T1 + form.eps)


def _normalised(
    y_TN: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, form: NormForm
) -> torch.Tensor:
    """x_hat from y; where a weight is zero its feature says nothing and has no gradient either."""
    if bias is not None:
        y_TN = y_TN - bias.float()
    if weight is None:
        return y_TN
    scale_N = weight.float() + form.offset
    return y_TN * torch.where(scale_N == 0, 0.0, 1 / scale_N)


def recognise(module: nn.Module, hidden_size: int) -> NormForm | None:
    """Return the formula of a norm over the hidden size, found by trying its class out; None if it is no such norm.

    Forward and backward pass of :class:`NormFunction` are compared with the stock module's on random input and random
    weights, so that it does not matter where the module's own are (meta device, sharded, quantised).
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    shape = weight.shape if isinstance(weight, torch.Tensor) else getattr(module, "normalized_shape", ())
    if tuple(shape) != (hidden_size,) or next(module.children(), None) is not None:
        return None
    if set(module._parameters) - {"weight", "bias"} or module._buffers:
        return None
    eps = next((e for e in (getattr(module, n, None) for n in _EPS_NAMES) if isinstance(e, float)), None)
    if eps is None:
        return None
    source = torch.Generator().manual_seed(0)
    x_TN = 0.5 + torch.rand(_PROBE_TOKENS, hidden_size, generator=source).mul(3)
    probe = _with_random_weights(module, hidden_size, source, has_bias=bias is not None, has_weight=weight is not None)
    for form in (NormForm(centred, offset, eps) for centred in (False, True) for offset in (0.0, 1.0)):
        if _agrees(probe, x_TN, form):
            return None if _hides_features(weight, form) else form
    return None


_EPS_NAMES = ("eps", "variance_epsilon", "epsilon")


def _hides_features(weight: torch.Tensor | None, form: NormForm) -> bool:
    """Say whether a feature has the weight zero, so that the output does not tell its value; seen in loaded weights."""
    if weight is None or weight.is_meta or isinstance(weight, DTensor):
        return False
    return bool((weight + form.offset == 0).any())


def _with_random_weights(
    module: nn.Module, size: int, source: torch.Generator, *, has_bias: bool, has_weight: bool
) -> nn.Module:
    """Return a module of the same class and settings with weights of its own on the CPU, without hooks or patches."""
    probe = object.__new__(type(module))
    probe.__dict__ = {**module.__dict__, "_parameters": {}}
    probe.__dict__.pop("forward", None)
    for name, present in (("weight", has_weight), ("bias", has_bias)):
        value = nn.Parameter(0.5 + torch.rand(size, generator=source)) if present else None
        probe._parameters[name] = value
    return probe


def _agrees(probe: nn.Module, x_TN: torch.Tensor, form: NormForm) -> bool:
    """Say whether values and all gradients of the formula are those of the module."""
    leaves = [p for p in (probe._parameters["weight"], probe._parameters["bias"]) if p is not None]
    grad_TN = x_TN.flip(0).sin()
    with torch.enable_grad():
        x_TN = x_TN.clone().requires_grad_()
        try:
            stock_TN = type(probe).forward(probe, x_TN)
            expected = torch.autograd.grad(stock_TN, [x_TN, *leaves], grad_TN)
        except Exception:  # whatever a class that is no norm does with such an input
            return False
        weight, bias = probe._parameters["weight"], probe._parameters["bias"]
        ours_TN = NormFunction.apply(  # type: ignore[no-untyped-call]
            x_TN, weight, bias, form, lambda x: type(probe).forward(probe, x), _hold
        )
        gradients = torch.autograd.grad(ours_TN, [x_TN, *leaves], grad_TN)
    return all(torch.allclose(f, e, rtol=1e-3, atol=1e-4) for f, e in zip(gradients, expected, strict=True))


def _hold(y_TN: torch.Tensor) -> Saved:
    return Saved(Raw(y_TN), y_TN.shape)

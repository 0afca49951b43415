"""Defines the autograd functions behind the lean forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from raymem.linalg.lowrank import row_chunks
from raymem.methods.layers.norms import NormForm
from raymem.training.lean.nf4 import Weight

# T tokens, N features (of a linear layer: out), K input features, R rank

_CHUNK_BYTES = 16 << 20
"""Bytes of a temporary that is worked through by rows."""

_NINTHS = 0x8040201008040201 - (1 << 64)
"""Bits 0, 9, 18, ... 63: a product with it has copies of a number at distances of nine bits."""
_LOWEST = 0x0101010101010101


class NormFunction(torch.autograd.Function):
    """The module's own forward pass; backward starts from the input, in fp32 and a few rows at a time.

    ``forward(x, weight, bias, form, compute)``: ``compute(x)`` is the stock forward pass. With ``x_hat = (x - mean) /
    std`` (no mean for RMSNorm) and ``g = dL/dy (w + o)``: ``dL/dx = (g - mean(g x_hat) x_hat - mean(g)) / std``.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any, form: NormForm, compute: Any) -> torch.Tensor:
        ctx.form = form
        ctx.save_for_backward(x, weight, bias)
        output: torch.Tensor = compute(x)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        form: NormForm = ctx.form
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        size = x.shape[-1]
        x_TN, grad_TN = x.reshape(-1, size), grad.reshape(-1, size)
        scale_N = None if weight is None else weight.float() + form.offset
        result_TN = torch.empty_like(x_TN) if of_x else None
        sum_w = torch.zeros(size, dtype=torch.float32, device=x.device) if of_weight else None
        sum_b = torch.zeros(size, dtype=torch.float32, device=x.device) if of_bias else None
        for rows in row_chunks(x_TN.shape[0], 4 * size, _CHUNK_BYTES):
            hat_CN, grad_CN = x_TN[rows].float(), grad_TN[rows].float()
            if form.centred:
                hat_CN = hat_CN - hat_CN.mean(-1, keepdim=True)
            rstd_C1 = torch.rsqrt(hat_CN.square().mean(-1, keepdim=True) + form.eps)
            hat_CN = hat_CN * rstd_C1
            if sum_w is not None:
                sum_w += (grad_CN * hat_CN).sum(0)
            if sum_b is not None:
                sum_b += grad_CN.sum(0)
            if result_TN is not None:
                inner_CN = grad_CN if scale_N is None else grad_CN * scale_N
                slope_CN = inner_CN - hat_CN * (inner_CN * hat_CN).mean(-1, keepdim=True)
                if form.centred:
                    slope_CN -= inner_CN.mean(-1, keepdim=True)
                result_TN[rows] = slope_CN.mul_(rstd_C1).to(x.dtype)
        return (
            None if result_TN is None else result_TN.view(x.shape),
            None if sum_w is None else sum_w.to(weight.dtype),
            None if sum_b is None else sum_b.to(bias.dtype),
            None,
            None,
        )


class GateFunction(torch.autograd.Function):
    """``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_up
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up


class LoraFunction(torch.autograd.Function):
    """``y = h W^T + bias + scaling (dropout(h) A^T) B^T`` with ``h = x``, or ``silu(x) * up`` where there is an ``up``.

    ``forward(x, up, A, B, dense, weight, scaling, rate)``: ``dense`` is ``weight.dense``, named so that autograd keeps
    it. ``h`` is made anew in backward if it is a product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, up: Any, a_RK: torch.Tensor, b_NR: torch.Tensor, dense_NK: Any, weight: Weight,
        scaling: float, rate: float,
    ) -> torch.Tensor:  # fmt: skip
        h = x if up is None else F.silu(x).mul_(up)
        h_TK = h.reshape(-1, h.shape[-1])
        y = weight.times(h)
        bits = None
        if rate == 0:
            inner_TR = h_TK @ a_RK.mT
        else:
            inner_TR = h_TK.new_empty(h_TK.shape[0], a_RK.shape[0])
            bits = h_TK.new_empty(h_TK.shape[0], -(-h_TK.shape[1] // 8), dtype=torch.uint8)
            for rows in _rows_of(h_TK):
                mask_CK = torch.empty_like(h_TK[rows], dtype=torch.bool).bernoulli_(1 - rate)
                inner_TR[rows] = _dropped(h_TK[rows], mask_CK, rate) @ a_RK.mT
                bits[rows] = pack_bits(mask_CK)
        y.view(-1, y.shape[-1]).addmm_(inner_TR, b_NR.mT, alpha=scaling)
        ctx.save_for_backward(x, up, a_RK, b_NR, dense_NK, inner_TR, bits)
        ctx.weight, ctx.scaling, ctx.rate = weight, scaling, rate
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, up, a_RK, b_NR, dense_NK, inner_TR, bits = ctx.saved_tensors
        of_x, of_up, of_a, of_b = ctx.needs_input_grad[:4]
        grad_TN = grad.reshape(-1, grad.shape[-1])
        grad_b = (grad_TN.mT @ inner_TR).mul_(ctx.scaling) if of_b else None
        slope_TR = (grad_TN @ b_NR).mul_(ctx.scaling)
        grad_a = _gradient_of_a(slope_TR, x, up, bits, ctx.rate) if of_a else None
        grad_x = grad_up = None
        if of_x or of_up:
            grad_h = ctx.weight.gradient(grad_TN, dense_NK)
            if bits is None:
                grad_h.addmm_(slope_TR, a_RK)
            else:
                for rows in _rows_of(grad_h):
                    mask_CK = unpack_bits(bits[rows], grad_h.shape[1])
                    grad_h[rows] += _dropped(slope_TR[rows] @ a_RK, mask_CK, ctx.rate)
            grad_x = grad_h.view(x.shape)
            if up is not None:
                grad_up = F.silu(x).mul_(grad_x) if of_up else None
                grad_x.mul_(up)
                torch.ops.aten.silu_backward.grad_input(grad_x, x, grad_input=grad_x)
        return grad_x if of_x else None, grad_up, grad_a, grad_b, None, None, None, None


def _gradient_of_a(
    slope_TR: torch.Tensor, x: torch.Tensor, up: torch.Tensor | None, bits: torch.Tensor | None, rate: float
) -> torch.Tensor:
    """Compute ``slope^T dropout(h)``; recomputes ``dropout(h)`` for that, a few rows at a time."""
    x_TK = x.reshape(-1, x.shape[-1])
    if up is None and bits is None:
        return slope_TR.mT @ x_TK
    up_TK = None if up is None else up.reshape(x_TK.shape)
    sum_RK = torch.zeros(slope_TR.shape[1], x_TK.shape[1], dtype=torch.float32, device=x.device)
    for rows in _rows_of(x_TK):
        h_CK = x_TK[rows] if up_TK is None else F.silu(x_TK[rows]).mul_(up_TK[rows])
        if bits is not None:
            h_CK = _dropped(h_CK, unpack_bits(bits[rows], x_TK.shape[1]), rate)
        sum_RK += slope_TR[rows].mT @ h_CK
    return sum_RK.to(slope_TR.dtype)


def _dropped(h_CK: torch.Tensor, mask_CK: torch.Tensor, rate: float) -> torch.Tensor:
    """Apply dropout with a given mask."""
    return (h_CK * mask_CK).mul_(1 / (1 - rate))


def pack_bits(mask_CK: torch.Tensor) -> torch.Tensor:
    """Pack eight mask numbers into a byte [C, K / 8]: bytes of an integer, whose copies meet in its highest byte."""
    missing = -mask_CK.shape[1] % 8
    whole_CK = F.pad(mask_CK, (0, missing)) if missing else mask_CK
    return (whole_CK.view(torch.int64) * _NINTHS >> 56).to(torch.uint8)


def unpack_bits(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack the mask [C, K]: of the copies of a byte, the highest bit in each byte of an integer."""
    spread = (bits.to(torch.int64).mul_(_NINTHS) >> 7).bitwise_and_(_LOWEST)
    return spread.view(torch.bool)[:, :columns]


def _rows_of(matrix: torch.Tensor) -> Iterator[slice]:
    return row_chunks(matrix.shape[0], matrix.shape[1] * matrix.element_size(), _CHUNK_BYTES)

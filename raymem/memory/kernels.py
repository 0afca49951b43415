"""Computes the memory that kernels allocate and free inside, where no trace of operations shows it.

Each rule was found by comparing the trace with the allocator's own count (CPU), or is taken from the kernel's source
(CUDA, marked; not measured by this project).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Rule = Callable[[tuple[Any, ...], Any], int]
"""A function from arguments and result of an operation to the bytes inside its kernel."""


def workspace(kind: str) -> Callable[[Any, tuple[Any, ...], Any], int]:
    """Return the function for the kernels of a kind of device, for :class:`raymem.memory.trace.Tracer`."""
    rules = _RULES[kind if kind in _RULES else "cuda"]

    def used(func: Any, args: tuple[Any, ...], result: Any) -> int:
        rule = rules.get(func._schema.name)
        return 0 if rule is None else rule(args, result)

    return used


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _dequantised(args: tuple[Any, ...], result: Any) -> int:
    """bitsandbytes multiplies many rows by the whole weight, dequantised to the dtype of the input [N, K]; with double
    quantisation the scales come first, in fp32."""
    inputs, numel, blocksize = args[0], math.prod(args[2]), args[4]
    return int(numel * inputs.element_size() + 2 * 4 * (numel // blocksize))


def _flash_backward(args: tuple[Any, ...], result: Any) -> int:
    """FlashAttention 2 sums the gradient of the queries in fp32, rows in multiples of 128 and heads of 32, and keeps a
    row sum; gradients of shared key-value heads are first made for every query head [B, H, S, D]."""
    query, key = args[1], args[2]
    batch, heads, rows, width = query.shape
    padded_rows, padded_width = -(-rows // 128) * 128, -(-width // 32) * 32
    sums = 4 * batch * heads * padded_rows * (padded_width + 1)
    expanded = 2 * _bytes(key) * heads // key.shape[1] if key.shape[1] != heads else 0
    return int(sums + expanded)


def _flash_backward_cpu(args: tuple[Any, ...], result: Any) -> int:
    """PyTorch's CPU kernel works through blocks of queries and keys: attention and its gradient of one block in fp32,
    in lower precision once more, and a row sum; one thread's share."""
    query, key = args[1], args[2]
    rows = query.shape[2]
    queries, keys = min(256 if rows >= 768 else 64 if rows >= 192 else 32, rows), min(512, key.shape[2])
    reduced = 0 if query.dtype == torch.float32 else query.element_size()
    return int(2 * queries * keys * (4 + reduced) + 4 * queries)


def _mixed_operand(args: tuple[Any, ...], result: Any) -> int:
    """CPU kernels of two operands cast one of another dtype to the common one in a temporary."""
    if not isinstance(result, torch.Tensor):
        return 0
    cast = 0
    for operand in args[:2]:
        if isinstance(operand, torch.Tensor) and operand.dim() > 0 and operand.dtype != result.dtype:
            cast += operand.numel() * result.element_size()
    return cast


_RULES: dict[str, dict[str, Rule]] = {
    "cpu": {
        "bitsandbytes::gemm_4bit": _dequantised,
        "raymem::gemm_4bit": _dequantised,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward_cpu,
        "aten::add.Tensor": _mixed_operand,
        "aten::add": _mixed_operand,
        "aten::mul": _mixed_operand,
    },
    "cuda": {
        "bitsandbytes::gemm_4bit": _dequantised,
        "raymem::gemm_4bit": _dequantised,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    },
}

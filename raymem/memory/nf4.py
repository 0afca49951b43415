"""Stands in for bitsandbytes' 4-bit layers as far as memory goes, without bitsandbytes.

A planned step needs of a 4-bit layer which tensors it keeps and which its kernels make, no values. So the operations
here have shapes and no kernels (they cannot run on real tensors), and cost a fraction of what the compiler costs that
bitsandbytes imports. tests/planner/test_nf4.py holds the plans of both to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

BLOCK, NESTED_BLOCK = 64, 256
"""Weights per NF4 scale, and scales per scale of scales (bitsandbytes' double quantisation)."""


def weight_bytes(numel: int) -> int:
    """Count the bytes of a linear layer's weights in NF4, doubly quantised: 4 + 8/64 + 32/(64*256) bits each."""
    blocks = math.ceil(numel / BLOCK)
    return math.ceil(numel / 2) + blocks + 4 * math.ceil(blocks / NESTED_BLOCK)


_OPERATIONS = ("gemm_4bit", "dequantize_blockwise", "dequantize_4bit")
STANDS_FOR = {f"raymem::{name}": f"bitsandbytes::{name}" for name in _OPERATIONS}
"""Maps each operation to the one of bitsandbytes that it stands in for."""

_Shape = TypeVar("_Shape", bound=Callable[..., torch.Tensor])

torch.library.define(
    "raymem::gemm_4bit",
    "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, Tensor? bias=None, Tensor? absmax_8bit=None, "
    "Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
)
torch.library.define("raymem::dequantize_blockwise", "(Tensor A, ScalarType dtype) -> Tensor")
torch.library.define("raymem::dequantize_4bit", "(Tensor A, Tensor absmax, int[] shape, ScalarType dtype) -> Tensor")


def _shape_of(operation: str) -> Callable[[_Shape], _Shape]:
    return torch.library.register_fake(operation)  # type: ignore[no-any-return]


@_shape_of("raymem::gemm_4bit")
def _gemm(A: torch.Tensor, B: torch.Tensor, shapeB: list[int], *others: Any, **options: Any) -> torch.Tensor:
    return torch.empty((*A.shape[:-1], shapeB[0]), dtype=A.dtype, device=A.device)


@_shape_of("raymem::dequantize_blockwise")
def _blockwise(A: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(A, dtype=dtype)


@_shape_of("raymem::dequantize_4bit")
def _4bit(A: torch.Tensor, absmax: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=A.device)


@dataclass
class QuantState:
    """Scales and shape of a 4-bit weight, under the names of bitsandbytes' class."""

    absmax: torch.Tensor
    shape: torch.Size | None = None
    code: torch.Tensor | None = None
    blocksize: int = BLOCK
    quant_type: str | None = None
    dtype: torch.dtype = torch.float32
    offset: torch.Tensor | None = None
    state2: QuantState | None = None

    @property
    def nested(self) -> bool:
        return self.state2 is not None


class Params4bit(nn.Parameter):
    """The weight before it has been quantised: its shape, on the meta device. Named as bitsandbytes' class."""


def quantised(weight: torch.Tensor) -> nn.Parameter:
    """Replace a weight by packed bytes that know their scales, double quantised. In fake mode only."""
    numel = weight.numel()
    blocks = -(-numel // BLOCK)
    nested = QuantState(torch.empty(-(-blocks // NESTED_BLOCK)), code=torch.empty(256), blocksize=NESTED_BLOCK)
    state = QuantState(
        torch.empty(blocks, dtype=torch.uint8),
        shape=weight.shape,
        dtype=weight.dtype,
        code=torch.empty(16),
        quant_type="nf4",
        offset=torch.empty(()),
        state2=nested,
    )
    packed: Any = nn.Parameter(torch.empty((numel + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = state
    return packed  # type: ignore[no-any-return]


class Linear4bit(nn.Linear):
    """A frozen 4-bit layer, which multiplies as bitsandbytes' does once its weight is what :func:`quantised` gives."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self.weight = Params4bit(self.weight.data, requires_grad=False)
        self.compute_dtype = dtype
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        input_dtype = x.dtype
        x = x.to(self.compute_dtype)
        bias: torch.Tensor | None = self.bias
        if bias is not None:
            if bias.dtype != x.dtype:
                bias.data = bias.data.to(x.dtype)
            bias = bias.to(self.compute_dtype)
        held = self.packed_weight()
        assert held is not None
        return multiply(x, *held, bias).to(input_dtype)

    def packed_weight(self) -> tuple[torch.Tensor, Any] | None:
        """Return the packed bytes and the state by which they are read; None as long as they are not there."""
        state = getattr(self.weight, "quant_state", None)
        return None if state is None else (self.weight, state)


def multiply(x: torch.Tensor, packed: torch.Tensor, state: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute ``x W^T + bias`` as the library that reads weights with this state does."""
    if not isinstance(state, QuantState):
        import bitsandbytes as bnb

        real: torch.Tensor = bnb.matmul_4bit(x, packed, bias=bias, quant_state=state)
        return real
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    product: Any = _Product.apply if needs_grad else _product
    return product(x, packed, bias, state)  # type: ignore[no-any-return]


def is_4bit(module: nn.Module) -> bool:
    """Say whether a module is a 4-bit linear layer: of bitsandbytes, or one of those here."""
    return any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__)


def packed_weight(layer: Any) -> tuple[torch.Tensor, Any] | None:
    """Return the packed bytes of a linear layer and the state by which they are read; None where it has none."""
    if isinstance(layer, Linear4bit):
        return layer.packed_weight()
    weight = layer._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    return None if state is None else (weight, state)


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, state: QuantState) -> torch.Tensor:
    assert state.state2 is not None
    product: torch.Tensor = torch.ops.raymem.gemm_4bit.default(
        x, packed, state.shape, state.state2.absmax, state.blocksize, bias, state.absmax, state.state2.code,
        state.offset,
    )  # fmt: skip
    return product


class _Product(torch.autograd.Function):
    """Nothing is kept for backward but the weight, which is dequantised as a whole there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: Any, state: QuantState) -> torch.Tensor:
        ctx.packed, ctx.state, ctx.bias_dtype = packed, state, None if bias is None else bias.dtype
        return _product(x, packed, bias, state)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        grad_bias = gradient.sum(0, dtype=ctx.bias_dtype) if needs_bias else None
        grad_x = None
        if needs_x:
            grad_x = torch.matmul(gradient, dequantize_4bit(ctx.packed, ctx.state).to(gradient.dtype))
        return grad_x, None, grad_bias, None


def dequantize_blockwise(A: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Do for scales what bitsandbytes.functional's of that name does."""
    values: torch.Tensor = torch.ops.raymem.dequantize_blockwise.default(A, state.dtype)
    return values


def dequantize_4bit(A: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Do what bitsandbytes.functional's of that name does."""
    absmax = state.absmax
    if state.state2 is not None:
        absmax = dequantize_blockwise(absmax, state.state2)
        assert state.offset is not None
        absmax += state.offset
    assert state.shape is not None
    weight: torch.Tensor = torch.ops.raymem.dequantize_4bit.default(A, absmax, state.shape, state.dtype)
    return weight


def functional(state: Any) -> Any:
    """Return the library that reads weights with this state: bitsandbytes.functional, or this module."""
    return library(planned=isinstance(state, QuantState))


def library(*, planned: bool) -> Any:
    """Return bitsandbytes.functional, or this module where only memory counts."""
    if planned:
        import raymem.memory.nf4 as own

        return own
    import bitsandbytes.functional as bnb

    return bnb

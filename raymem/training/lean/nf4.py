"""Multiplies by the frozen weight of a linear layer, plain or in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from raymem.memory.nf4 import functional, packed_weight

# T tokens, N output features, K input features

WHOLE_BYTES = 128 << 20
"""Bytes up to which a 4-bit weight is dequantised whole."""
BLOCK_BYTES = 32 << 20
"""Bytes, about, of a larger weight that are dequantised at a time."""
_FEW_TOKENS = 1536
"""Rows up to which bitsandbytes may have a kernel that dequantises nothing."""


class Weight:
    """The frozen weight of one linear layer."""

    def __init__(self, layer: Any, *, packed: bool) -> None:
        self._layer = layer
        self.dense: torch.Tensor | None = None if packed else layer.weight
        """The weight that autograd has to keep, if it is not packed."""

    @staticmethod
    def of(layer: nn.Module, dtype: torch.dtype) -> Weight | None:
        """Wrap the weight of a layer; None where it is no plain frozen one of this dtype."""
        kind, weight = type(layer), layer._parameters.get("weight")
        if weight is None or weight.requires_grad or isinstance(weight, DTensor):
            return None
        bias = layer._parameters.get("bias")
        if bias is not None and (bias.requires_grad or bias.dtype != dtype):
            return None
        if kind is nn.Linear:
            return Weight(layer, packed=False) if weight.dtype == dtype else None
        packed = packed_weight(layer) is not None
        return Weight(layer, packed=True) if packed and getattr(layer, "compute_dtype", None) == dtype else None

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Compute ``x W^T + bias``, freshly allocated."""
        if self.dense is not None or not self._is_large(x):
            return self._layer(x)  # type: ignore[no-any-return]
        x_TK = x.flatten(0, -2)
        packed_NK, scales_NK, state = self._unpacked()
        rows, columns = state.shape
        y_TN = x_TK.new_empty(x_TK.shape[0], rows)
        step = max(1, BLOCK_BYTES // (columns * x.element_size()))
        for start in range(0, rows, step):
            part = slice(start, min(rows, start + step))
            torch.mm(x_TK, _dequantised(packed_NK[part], scales_NK[part], state, x.dtype).mT, out=y_TN[:, part])
        if self._layer.bias is not None:
            y_TN += self._layer.bias
        return y_TN.view(*x.shape[:-1], rows)

    def gradient(self, grad_TN: torch.Tensor, dense_NK: torch.Tensor | None) -> torch.Tensor:
        """Compute ``g W`` [T, K].

        Args:
            dense_NK: what autograd kept of :attr:`dense`.
        """
        if dense_NK is not None:
            return grad_TN @ dense_NK
        packed_NK, scales_NK, state = self._unpacked()
        if not self._is_large(grad_TN):
            return grad_TN @ _dequantised(packed_NK, scales_NK, state, grad_TN.dtype)
        rows, columns = state.shape
        grad_TK = grad_TN.new_empty(grad_TN.shape[0], columns)
        # By input features, so that every number of the result comes from one product; scales belong to whole blocks.
        step = max(1, BLOCK_BYTES // (rows * grad_TN.element_size() * state.blocksize)) * state.blocksize
        for start in range(0, columns, step):
            part = slice(start, min(columns, start + step))
            packed = packed_NK[:, part.start // 2 : part.stop // 2].contiguous()
            scales = scales_NK[:, part.start // state.blocksize : part.stop // state.blocksize].contiguous()
            torch.mm(grad_TN, _dequantised(packed, scales, state, grad_TN.dtype), out=grad_TK[:, part])
        return grad_TK

    def _is_large(self, x: torch.Tensor) -> bool:
        _, state = self._packed()
        rows, columns = state.shape
        whole = rows * columns * x.element_size() <= WHOLE_BYTES
        tokens = x.numel() // x.shape[-1]
        return not whole and tokens > _FEW_TOKENS and columns % state.blocksize == 0

    def _packed(self) -> tuple[torch.Tensor, Any]:
        """Return the bytes of the weight as they lie now: a sharded one is gathered anew for every pass."""
        held = packed_weight(self._layer)
        assert held is not None
        return held

    def _unpacked(self) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return the packed weight [N, K / 2], fp32 scales [N, K / blocksize] and the state; one row where rows share a
        block."""
        weight, state = self._packed()
        scales: torch.Tensor = state.absmax
        if state.nested:
            scales = functional(state).dequantize_blockwise(scales, state.state2)
            scales += state.offset
        rows = state.shape[0] if state.shape[1] % state.blocksize == 0 else 1
        return weight.detach().view(rows, -1), scales.float().view(rows, -1), state


def _dequantised(packed_NK: torch.Tensor, scales: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Dequantise some rows or columns [N, K], straight in the dtype of the product."""
    whole = packed_NK.shape[0] == 1
    shape = state.shape if whole else torch.Size((packed_NK.shape[0], 2 * packed_NK.shape[1]))
    library = functional(state)
    part = library.QuantState(
        absmax=scales.reshape(-1), shape=shape, code=state.code, blocksize=state.blocksize, quant_type=state.quant_type,
        dtype=dtype,
    )  # fmt: skip
    dense_part: torch.Tensor = library.dequantize_4bit(packed_NK.reshape(-1, 1), part)
    return dense_part

"""The maths of a MoRAM layer: y = x (W + s M * (B A))^T + b, with M given by the K selected columns of every row.

With d_ik = s <B_i, A[:, J_ik]> and the sampled gradient S_ik = s <gy[:, i], x[:, J_ik]>, and D the [O, I] matrix that
holds S at the selected places: grad B = D A^T, grad A = B^T D, grad x = gy (W + M * d). The effective weight exists one
chunk of rows at a time; M, B A and the dense gradient never do. Two formulations differ in how they find S:

* ``frugal``: a chunk of the dense weight gradient gy^T x, of which the selected entries are kept. One more matrix
  product, on any device; its temporaries are a fifth of the weight.
* ``fast``: dot products of rows of gy^T and x^T at the selected places only. Little arithmetic at low density; needs
  blocks of x^T and gy^T of some hundred tokens.

Nothing is kept for backward but x.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from raymem.memory.target import device_kind, worth_visiting
from raymem.methods.moram.base import BaseWeight

# T tokens, O outputs, I inputs, R rank, K connections per row, C rows of a chunk

Chosen = Literal["fast", "frugal"]

FAST_UP_TO = {torch.float32: 0.06, torch.float64: 0.06, torch.bfloat16: 0.02, torch.float16: 0.02}
"""Highest density at which ``fast`` wins on a CPU (benchmarks/moram_linear.py); low precision has faster products."""
_FRUGAL_SHARE, _FAST_SHARE = 4.8, 2.0
_FRUGAL_BYTES, _FAST_BYTES = (1 << 16, 1 << 22), (1 << 20, 1 << 25)
"""A chunk is this share of the weight, within these bytes, and never the whole of it."""
_ROWS_TOGETHER = 64
"""CPU kernels take a tenth longer for other multiples of rows."""


def choose_formulation(
    density: float, dtype: torch.dtype, device_type: str, *, save_memory: bool = False
) -> Chosen:  # fmt: skip
    """Return the faster formulation for a layer, or the one with the smaller temporaries.

    Args:
        density: K / I.
        dtype: in which the layer multiplies.
        save_memory: take ``frugal`` whatever the speed.
    """
    if save_memory or device_type not in ("cpu", "meta"):
        return "frugal"  # matrix units find the dense gradient sooner than gathers find its entries
    return "fast" if density <= FAST_UP_TO.get(dtype, 0.0) else "frugal"


@dataclass(frozen=True)
class _Call:
    """Options of one use of a layer, besides its tensors."""

    transposed: bool
    quant_state: Any
    scale: float
    formulation: Chosen


def moram_linear(
    x: torch.Tensor,
    index_OK: torch.Tensor,
    factor_A_RI: torch.Tensor,
    factor_B_OR: torch.Tensor,
    *,
    scale: float,
    base: BaseWeight,
    bias_O: torch.Tensor | None = None,
    formulation: Chosen = "frugal",
) -> torch.Tensor:
    """Forward pass of a MoRAM layer, differentiable once: x (W + s M * (B A))^T + b.

    Args:
        x: [..., I], any floating dtype; it is the dtype of the result and of the products.
        index_OK: int32, the selected columns of every row, each once.
        factor_A_RI, factor_B_OR: of any floating dtype; the effective weight is formed in theirs (fp32 at least) and
            rounded once to that of ``x``, as merging does.
        scale: s = alpha / rank.
        base: the frozen weight; it gets no gradient.
        bias_O: added; may require a gradient.

    Returns:
        [..., O].
    """
    call = _Call(base.transposed, base.quant_state, scale, formulation)
    with torch.autocast(x.device.type, enabled=False):
        arguments = (x, base.weight, bias_O, index_OK, factor_A_RI, factor_B_OR, call)
        result: torch.Tensor = _MoRAMLinear.apply(*arguments)  # type: ignore[no-untyped-call]
        return result


class _Chunks:
    """Walks over the effective weight with one buffer of C rows in the precision of the factors (fp32 at least)."""

    def __init__(
        self, weight: torch.Tensor | None, index_OK: torch.Tensor, A_RI: torch.Tensor, B_OR: torch.Tensor, call: _Call
    ) -> None:
        base = BaseWeight(weight, call.transposed, call.quant_state)
        self.work_dtype = torch.promote_types(A_RI.dtype, torch.float32)
        self._index_OK, self._A_RI, self._B_OR, self._scale = index_OK, A_RI.to(self.work_dtype), B_OR, call.scale
        # Dot products of rank length where they are cheaper than all of B A.
        self._A_IR = self._A_RI.mT.contiguous() if call.formulation == "fast" else None
        self._reader = base.rows()
        outputs, inputs = B_OR.shape[0], A_RI.shape[1]
        row_bytes = inputs * self.work_dtype.itemsize
        share, (least, most) = (
            (_FAST_SHARE, _FAST_BYTES) if call.formulation == "fast" else (_FRUGAL_SHARE, _FRUGAL_BYTES)
        )
        stored_bytes = 2 if call.quant_state is not None else (A_RI if weight is None else weight).element_size()
        share *= max(1, self.work_dtype.itemsize // stored_bytes)  # beside the buffer there are copies in its dtype
        buffer_bytes = max(least, min(most, int(outputs * inputs * stored_bytes / share)))
        count = max(1, min(buffer_bytes // row_bytes, -(-outputs // 2)))
        multiple = base.row_multiple
        count = -(-count // multiple) * multiple
        together = math.lcm(multiple, _ROWS_TOGETHER)
        if count > together and device_kind(A_RI.device) == "cpu":
            count -= count % together
        starts = worth_visiting(range(0, outputs, count))
        self.rows = [slice(start, min(outputs, start + count)) for start in starts]
        self._buffer_shape = min(count, outputs), inputs

    @functools.cached_property
    def _buffer_CI(self) -> torch.Tensor:
        return torch.empty(self._buffer_shape, dtype=self.work_dtype, device=self._A_RI.device)

    def buffer(self, rows: slice) -> torch.Tensor:
        """Return the buffer's part for these rows; whatever it held is overwritten."""
        return self._buffer_CI[: rows.stop - rows.start]

    def index(self, rows: slice) -> torch.Tensor:
        """Return the selected columns of these rows [C, K], as gathers want them: CPUs take int32."""
        index_CK = self._index_OK[rows]
        return index_CK if device_kind(index_CK.device) == "cpu" else index_CK.long()

    def factor_B(self, rows: slice) -> torch.Tensor:
        return self._B_OR[rows].to(self.work_dtype)

    def weight(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of W + s M * (B A) [C, I]; valid until the buffer is used again."""
        delta_CK = self.delta(rows)
        self._reader.read(rows, self.buffer(rows))
        return self.buffer(rows).scatter_add_(1, self.index(rows), delta_CK).to(dtype)

    def delta(self, rows: slice) -> torch.Tensor:
        """Return rows of the update at the selected places, d [C, K]; may overwrite the buffer."""
        index_CK = self.index(rows)
        if self._A_IR is not None:
            return row_dots(self.factor_B(rows), self._A_IR, index_CK).mul_(self._scale)
        dense_CI = torch.mm(self.factor_B(rows), self._A_RI, out=self.buffer(rows))
        return dense_CI.gather(1, index_CK).mul_(self._scale)

    def sampled(self, rows: slice, grad_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        """Return rows of the sampled gradient S [C, K], picked from a chunk of the dense weight gradient."""
        grad_CT, buffer_CI = grad_TO[:, rows].mT, self.buffer(rows)
        dense_CI = torch.mm(grad_CT, x_TI, out=buffer_CI if buffer_CI.dtype == x_TI.dtype else None)
        return dense_CI.gather(1, self.index(rows))

    def factor_gradients(self, rows: slice, sampled_CK: torch.Tensor, grad_A_RI: torch.Tensor) -> torch.Tensor:
        """Return rows of grad B [C, R]; adds their part to grad A."""
        dense_CI = self.buffer(rows).zero_()
        dense_CI.scatter_(1, self.index(rows), sampled_CK.to(self.work_dtype) * self._scale)
        grad_A_RI.addmm_(self.factor_B(rows).mT, dense_CI)
        return dense_CI @ self._A_RI.mT


class _MoRAMLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias_O: torch.Tensor | None,
        index_OK: torch.Tensor,
        A_RI: torch.Tensor,
        B_OR: torch.Tensor,
        call: _Call,
    ) -> torch.Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO = x.new_empty(x_TI.shape[0], B_OR.shape[0])
        chunks = _Chunks(weight, index_OK, A_RI, B_OR, call)
        for rows in chunks.rows:
            weight_IC = chunks.weight(rows, x.dtype).mT
            if bias_O is None:
                torch.mm(x_TI, weight_IC, out=y_TO[:, rows])
            else:
                torch.addmm(bias_O[rows].to(x.dtype), x_TI, weight_IC, out=y_TO[:, rows])
        trains = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        ctx.save_for_backward(x if trains else None, weight, index_OK, A_RI, B_OR)
        ctx.call, ctx.x_shape = call, x.shape
        return y_TO.view(*x.shape[:-1], B_OR.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, index_OK, A_RI, B_OR = ctx.saved_tensors
        needs_x, _, needs_bias, _, needs_A, needs_B, _ = ctx.needs_input_grad
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_TO = grad_y.reshape(-1, grad_y.shape[-1])
            chunks = _Chunks(weight, index_OK, A_RI, B_OR, ctx.call)
            grad_x_TI = grad_TO.new_empty(grad_TO.shape[0], A_RI.shape[1]) if needs_x else None
            grad_A_RI = torch.zeros_like(A_RI, dtype=chunks.work_dtype)
            grad_B_OR = torch.empty_like(B_OR)
            sampled_OK = None
            if (needs_A or needs_B) and ctx.call.formulation == "fast":
                sampled_OK = sampled_dots(grad_TO, x.reshape(-1, x.shape[-1]), index_OK)
            for number, rows in enumerate(chunks.rows):
                if grad_x_TI is not None:
                    weight_CI = chunks.weight(rows, grad_TO.dtype)
                    torch.addmm(grad_x_TI, grad_TO[:, rows], weight_CI, beta=min(number, 1), out=grad_x_TI)
                if needs_A or needs_B:
                    if sampled_OK is None:
                        sampled_CK = chunks.sampled(rows, grad_TO, x.reshape(-1, x.shape[-1]))
                    else:
                        sampled_CK = sampled_OK[rows]
                    grad_B_OR[rows] = chunks.factor_gradients(rows, sampled_CK, grad_A_RI)
            return (
                None if grad_x_TI is None else grad_x_TI.view(ctx.x_shape),
                None,
                grad_TO.sum(0) if needs_bias else None,
                None,
                grad_A_RI.to(A_RI.dtype) if needs_A else None,
                grad_B_OR if needs_B else None,
                None,
            )


_TOKENS_AT_ONCE = 256
"""Tokens of a block of :func:`sampled_dots`: its part of x^T then stays in a core's cache."""


def sampled_dots(grad_TO: torch.Tensor, x_TI: torch.Tensor, index_OK: torch.Tensor) -> torch.Tensor:
    """S_ik = <gy[:, i], x[:, J_ik]> [O, K] by dot products, in fp32 at least: a sampled dense-dense product."""
    total = torch.zeros(index_OK.shape, dtype=torch.promote_types(x_TI.dtype, torch.float32), device=x_TI.device)
    tokens = min(_TOKENS_AT_ONCE, x_TI.shape[0])
    grad_buffer, x_buffer = grad_TO.new_empty(grad_TO.shape[1] * tokens), x_TI.new_empty(x_TI.shape[1] * tokens)
    for start in worth_visiting(range(0, x_TI.shape[0], _TOKENS_AT_ONCE)):
        blocks = (grad_TO[start : start + _TOKENS_AT_ONCE].mT, x_TI[start : start + _TOKENS_AT_ONCE].mT)
        grad_OB, x_IB = (
            buffer[: block.numel()].view(block.shape).copy_(block)
            for buffer, block in zip((grad_buffer, x_buffer), blocks, strict=True)
        )
        total += row_dots(grad_OB, x_IB, index_OK)
    return total


def row_dots(left_OT: torch.Tensor, right_IT: torch.Tensor, index_OK: torch.Tensor) -> torch.Tensor:
    """Return <left_i, right_{J_ik}> [O, K], in the dtype of both.

    The kernel is the one behind the gradient of ``F.embedding_bag``'s per-sample weights, with every row of
    ``index_OK`` as a bag. It sums low-precision products in fp32.
    """
    outputs, k = index_OK.shape
    offsets_O = torch.arange(0, outputs * k, k, dtype=index_OK.dtype, device=index_OK.device)
    bag_of = torch.arange(outputs, dtype=index_OK.dtype, device=index_OK.device).repeat_interleave(k)
    dots: torch.Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left_OT, right_IT, index_OK.reshape(-1), offsets_O, bag_of, 0
    )
    return dots.view(outputs, k)


@torch.no_grad()
def selected_delta(
    index_OK: torch.Tensor, factor_A_RI: torch.Tensor, factor_B_OR: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the update at the selected places, d_ik = s <B_i, A[:, J_ik]> [O, K], in fp32 at least."""
    formulation = choose_formulation(0.0, torch.float32, device_kind(index_OK.device))
    call = _Call(transposed=False, quant_state=None, scale=scale, formulation=formulation)
    chunks = _Chunks(None, index_OK, factor_A_RI, factor_B_OR, call)
    delta_OK = torch.empty(index_OK.shape, dtype=chunks.work_dtype, device=index_OK.device)
    for rows in chunks.rows:
        delta_OK[rows] = chunks.delta(rows)
    return delta_OK

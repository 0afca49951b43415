"""Summed cross-entropy of a head that is a plain product, with its gradients taken in the forward pass.

The loss is the last thing of a forward pass, so nothing is gained by keeping what its backward pass would need: for
every chunk of positions, logits become the loss and then, in place, the gradient with respect to them, which is
multiplied into the gradients of hidden states and head at once. Nothing is computed twice, and no more than the logits
of one chunk is ever there.

Shapes: N positions of a micro-batch, T of them with a target, C positions of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from raymem.memory.target import worth_visiting
from raymem.memory.trace import attributed
from raymem.methods.chunked_loss.rows import rows_per_chunk

_PARTS = 4
"""A chunk goes through fp32 in so many parts, so that logits of a lower precision need few bytes in fp32."""
_BLOCKS = 16
"""The gradient of the head is summed up in so many blocks of rows."""


def cross_entropy_sum(
    hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets_N: torch.Tensor, positions_T: torch.Tensor
) -> torch.Tensor:
    """Sum of -log softmax(hidden @ head.T)[target] over some positions, in nats; 0-dim fp32.

    Equal to ``torch.nn.functional.cross_entropy`` of the whole logits in fp32, up to rounding. Differentiable once with
    respect to ``hidden_NH`` and ``head_VH``; a second backward pass raises RuntimeError. Under autocast the products
    run in its dtype.

    Args:
        hidden_NH: hidden states, fp32 or bf16.
        head_VH: weight of the output head.
        targets_N: int64, the token that each position predicts; read at ``positions_T`` only.
        positions_T: int64, the positions that count, without repetition.
    """
    autocast = torch.is_autocast_enabled(hidden_NH.device.type)
    dtype = torch.get_autocast_dtype(hidden_NH.device.type) if autocast else head_VH.dtype
    loss: torch.Tensor = _CrossEntropySum.apply(hidden_NH, head_VH, targets_N, positions_T, dtype)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets_N: torch.Tensor, positions_T: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        with torch.autocast(hidden_NH.device.type, enabled=False):
            loss, ctx.grad_hidden_NH, grad_head = _forward(
                hidden_NH, head_VH, targets_N, positions_T, dtype, needs_hidden=needs_hidden, needs_head=needs_head
            )
            # Kept as attributes: hooks that offload or compress what is saved for backward must not see them.
            ctx.grad_head_VH = None if grad_head is None else grad_head.finish()
        ctx.is_spent = False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError("cross_entropy_sum: its gradients were handed over by an earlier backward pass")
        ctx.is_spent = True
        grads = ctx.grad_hidden_NH, ctx.grad_head_VH
        ctx.grad_hidden_NH = ctx.grad_head_VH = None
        return (*(None if grad is None else grad.mul_(grad_loss) for grad in grads), None, None, None)


def _forward(
    hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets_N: torch.Tensor, positions_T: torch.Tensor,
    dtype: torch.dtype, *, needs_hidden: bool, needs_head: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, _HeadGradient | None]:  # fmt: skip
    """Return the loss, and the gradients that are needed."""
    device, vocabulary = hidden_NH.device, head_VH.shape[0]
    is_fp32 = dtype == torch.float32
    rows = rows_per_chunk(vocabulary, 4 if is_fp32 else dtype.itemsize + 4 // _PARTS, device)
    rows = max(1, min(rows, len(positions_T)))
    part = -(-rows // _PARTS)
    weight_VH = head_VH.to(dtype)
    logits_CV = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    grad_hidden_NH = torch.zeros_like(hidden_NH) if needs_hidden else None
    grad_head = _HeadGradient(head_VH, dtype) if needs_head else None
    loss = torch.zeros((), device=device)

    for start in worth_visiting(range(0, len(positions_T), rows)):
        positions_C = positions_T[start : start + rows]
        hidden_CH = hidden_NH.index_select(0, positions_C).to(dtype)
        targets_C1 = targets_N.index_select(0, positions_C)[:, None]
        chunk_CV = torch.mm(hidden_CH, weight_VH.T, out=logits_CV[: len(positions_C)])
        part_fp32 = None if is_fp32 else torch.empty(min(part, len(chunk_CV)), vocabulary, device=device)
        for logits, targets in zip(torch.split(chunk_CV, part), torch.split(targets_C1, part), strict=True):
            values = logits if part_fp32 is None else part_fp32[: len(logits)].copy_(logits)
            values.sub_(values.amax(1, keepdim=True))
            of_target = values.gather(1, targets)
            total = values.exp_().sum(1, keepdim=True)
            loss += (total.log() - of_target).sum()
            if needs_hidden or needs_head:
                # softmax(z) - onehot, in fp32 and rounded once, as where the logits are whole.
                values.div_(total).scatter_add_(1, targets, torch.full_like(total, -1.0))
                if part_fp32 is not None:
                    logits.copy_(values)
        del values, part_fp32  # before the products, which may have buffers of their own
        if grad_hidden_NH is not None:
            grad_hidden_NH.index_copy_(0, positions_C, (chunk_CV @ weight_VH).to(grad_hidden_NH.dtype))
        if grad_head is not None:
            grad_head.add(chunk_CV, hidden_CH)
    return loss, grad_hidden_NH, grad_head


class _HeadGradient:
    """Gradient of the head [V, H], summed over chunks in fp32 whatever its dtype.

    For fp32 weights it is the gradient itself. For others it lies in blocks of its own, which are rounded and dropped
    one by one: never more than these fp32 sums are alive.
    """

    def __init__(self, head_VH: torch.Tensor, dtype: torch.dtype) -> None:
        self._head_dtype, self._dtype = head_VH.dtype, dtype
        vocabulary, hidden = head_VH.shape
        self._block = -(-vocabulary // _BLOCKS)
        self._whole_VH: torch.Tensor | None = None
        with attributed("gradients"):
            if head_VH.dtype == torch.float32:
                self._whole_VH = torch.zeros(vocabulary, hidden, device=head_VH.device)
                self._sums = list(torch.split(self._whole_VH, self._block))
            else:
                sizes = [min(self._block, vocabulary - start) for start in range(0, vocabulary, self._block)]
                self._sums = [torch.zeros(size, hidden, device=head_VH.device) for size in sizes]

    def add(self, grad_logits_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        """Add grad_logits.T @ hidden."""
        for sums, grad_CB in zip(self._sums, torch.split(grad_logits_CV, self._block, dim=1), strict=True):
            if self._dtype == torch.float32:
                sums.addmm_(grad_CB.T, hidden_CH)
            else:
                sums.add_((grad_CB.T @ hidden_CH).float())

    def finish(self) -> torch.Tensor:
        """Return the gradient in the dtype of the head."""
        if self._whole_VH is not None:
            return self._whole_VH
        with attributed("gradients"):
            for index in range(len(self._sums)):
                self._sums[index] = self._sums[index].to(self._head_dtype)
            return torch.cat(self._sums)

"""Reads the frozen weight under a MoRAM layer by rows, patches it at the selected places, and identifies it.

A weight is used directly where its layer computes exactly ``x W^T + b``: ``nn.Linear``, GPT-2's ``Conv1D`` (which
stores W transposed) and bitsandbytes' 4-bit layers, of which a range of rows is dequantised at a time. Any other layer
(other quantised formats, patched or hooked forwards) computes its own part, and only the update is added.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from raymem.errors import AdapterError
from raymem.memory import nf4
from raymem.memory.packed import packing_of
from raymem.private_apis import compute_local_shape_and_global_offset

# O outputs, I inputs, C rows of a chunk, K connections per row


@dataclass(frozen=True)
class BaseWeight:
    """The form in which a layer holds its weight."""

    weight: torch.Tensor | None
    """As stored; None where the layer computes its own part."""
    transposed: bool = False
    """[I, O], as in Conv1D."""
    quant_state: Any = None
    """bitsandbytes' description of a 4-bit weight."""

    @property
    def row_multiple(self) -> int:
        """Rows come in multiples of this many, so that no block of a quantised weight is cut."""
        if self.quant_state is None:
            return 1
        return int(self.quant_state.blocksize) // math.gcd(int(self.quant_state.blocksize), self.quant_state.shape[1])

    def rows(self) -> RowReader:
        """Return a reader for one pass over the rows."""
        return RowReader(self)


class RowReader:
    """Reads ranges of rows of W [O, I] in the order outputs x inputs."""

    def __init__(self, base: BaseWeight) -> None:
        self._base = base
        self._absmax: torch.Tensor | None = None
        state = base.quant_state
        if state is not None and state.nested:
            self._absmax = (
                nf4.functional(state).dequantize_blockwise(state.absmax, state.state2).add_(state.offset).float()
            )

    def read(self, rows: slice, out_CI: torch.Tensor) -> None:
        """Write rows of W into ``out_CI``, in its dtype; zeros if the layer computes its own part."""
        weight, state = self._base.weight, self._base.quant_state
        if weight is None:
            out_CI.zero_()
        elif state is not None:
            out_CI.copy_(self._dequantised(weight, rows))
        else:
            out_CI.copy_(weight[:, rows].mT if self._base.transposed else weight[rows])

    def _dequantised(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        state = self._base.quant_state
        bnb = nf4.functional(state)
        inputs = state.shape[1]
        absmax = state.absmax if self._absmax is None else self._absmax
        elements = slice(rows.start * inputs, rows.stop * inputs)
        part = bnb.QuantState(
            absmax=absmax[elements.start // state.blocksize : -(-elements.stop // state.blocksize)],
            shape=torch.Size(((elements.stop - elements.start) // state.blocksize, state.blocksize)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        packed = weight.reshape(-1).view(torch.uint8)[elements.start // 2 : -(-elements.stop // 2)]
        dense: torch.Tensor = bnb.dequantize_4bit(packed[:, None], part)
        return dense.view(-1, inputs)


def base_weight(layer: nn.Module) -> BaseWeight:
    """Say how ``layer`` holds its weight; opaque unless it computes exactly ``x W^T + b`` with nothing hooked in."""
    from transformers.pytorch_utils import Conv1D

    hooked = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    weight: Any = layer.weight
    if hooked or isinstance(weight, DTensor):
        return BaseWeight(None)
    if nf4.is_4bit(layer):
        held = nf4.packed_weight(layer)
        return BaseWeight(None) if held is None else _readable(*held)
    if weight.is_floating_point() and type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return BaseWeight(weight, transposed=isinstance(layer, Conv1D))
    return BaseWeight(None)


def _readable(packed: torch.Tensor, state: Any) -> BaseWeight:
    """Return a 4-bit weight, opaque where its rows cannot be read one range at a time."""
    # On CPUs bitsandbytes may keep another packing, and reads rows that end inside a block in its own way.
    packed_for_cpu = getattr(state, "packing_format_for_cpu", False)
    whole = state.shape[1] if packed.device.type == "cpu" else math.prod(state.shape)
    readable = not packed_for_cpu and whole % state.blocksize == 0
    return BaseWeight(packed, quant_state=state) if readable else BaseWeight(None)


def gathered_weight(layer: Any) -> BaseWeight:
    """Return the weight of a layer that may be sharded; collective if it is."""
    weight = layer.weight
    if not isinstance(weight, DTensor):
        return base_weight(layer)
    packing = packing_of(layer, "weight")
    full = weight.full_tensor()
    return BaseWeight(full) if packing is None else _readable(*packing.unpack(full))


def compute_dtype(layer: nn.Module, x: torch.Tensor) -> torch.dtype:
    """Dtype in which the layer multiplies: autocast's, that of a 4-bit layer, or its input's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return getattr(layer, "compute_dtype", None) or x.dtype


def fan(layer: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer.

    Raises:
        AdapterError: it is no linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, Conv1D):
        return int(layer.nf), int(layer.weight.shape[0])
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    raise AdapterError(
        f"MoRAM adapts linear layers (nn.Linear, bitsandbytes' and GPT-2's Conv1D), not {type(layer).__name__}; "
        "leave it out of target_modules"
    )


_ROW_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)


@torch.no_grad()
def fingerprint(layer: nn.Module) -> torch.Tensor:
    """Identify the stored bits of a layer's weight; collective for sharded weights.

    Integer sums are exact in any order (they wrap around), so every device, thread count and sharding finds the same.

    Returns:
        int64 [3] on the weight's device: the storage format, the sum of the bits, and their sum weighted by row.
    """
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    shape = weight.shape if state is None else state.shape
    text = f"{weight.dtype} {list(shape)} {type(layer).__name__ if state is not None else 'dense'}"
    form = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    first_row, local = 0, weight.detach()
    if isinstance(local, DTensor):
        _, offset = compute_local_shape_and_global_offset(local.shape, local.device_mesh, local.placements)
        first_row, local = offset[0], local.to_local()
    sums = _bit_sums(local, first_row)
    if isinstance(weight, DTensor):
        torch.distributed.all_reduce(sums, group=weight.device_mesh.get_group())
    while state is not None:  # the scales of a 4-bit weight, and their own
        sums += _bit_sums(state.absmax, 1 << 20)
        state = state.state2
    return torch.cat([torch.tensor([form], device=sums.device), sums])


def _bit_sums(tensor: torch.Tensor, first_row: int) -> torch.Tensor:
    """int64 [2]: sums of the elements' bits, plain and weighted by row."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(integers).view(len(tensor), -1)
    starts = range(0, len(bits), 1024)
    rows = [bits[start : start + 1024].flatten(1).sum(1, dtype=torch.int64) for start in starts]
    row_sums = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=tensor.device)
    factors = (torch.arange(len(row_sums), device=tensor.device) + first_row + 1) * _ROW_FACTOR
    return torch.stack([row_sums.sum(), (row_sums * (factors ^ (factors >> 29))).sum()])


@torch.no_grad()
def patch(layer: nn.Module, index_OK: torch.Tensor, values_OK: torch.Tensor) -> torch.Tensor:
    """Add ``values_OK`` to a dense weight at the selected places, rounding once; returns the old values [O, K]."""
    weight: Any = layer.weight
    weight_OI: torch.Tensor = weight.data.mT if base_weight(layer).transposed else weight.data
    columns_OK = index_OK.long()
    old_OK = weight_OI.gather(1, columns_OK)
    weight_OI.scatter_(1, columns_OK, (old_OK.to(values_OK.dtype) + values_OK).to(weight.dtype))
    return old_OK


@torch.no_grad()
def restore(layer: nn.Module, index_OK: torch.Tensor, old_OK: torch.Tensor) -> None:
    """Undo :func:`patch`, bit for bit."""
    weight: Any = layer.weight
    (weight.data.mT if base_weight(layer).transposed else weight.data).scatter_(1, index_OK.long(), old_OK)

"""Stores weights in 4 bits, with their scales, in one flat tensor that FSDP2 can shard and that experts can share.

bitsandbytes keeps the scales of a 4-bit weight beside its parameter, where FSDP2 does not see them: every worker would
hold them all. Here one frozen parameter holds the bytes of a weight [N, K], or of the weights of all experts of a layer
[E, N, K]. Its dtype is that of the base, so that FSDP2 gathers a block in one piece and casts nothing; what
bitsandbytes reads are views of it. Every matrix is quantised by itself, exactly as a linear layer of its own would be.

Sections of the flat tensor, each on a multiple of 16 bytes, with B blocks of 64 weights per matrix and G groups of 256
blocks (the last group of a matrix is filled up with zeros):

    codes    uint8 [E, N K / 2]   two weights per byte
    scales   uint8 [E, 256 G]     one per block
    nested   fp32  [E, G]         scales of the scales
    offsets  fp32  [E]            mean of the scales
    tables   fp32  [16], [256]    the values of NF4, and those of the scales
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from raymem.memory import nf4
from raymem.memory.nf4 import BLOCK, NESTED_BLOCK
from raymem.memory.target import worth_visiting

_ALIGNED_BYTES = 16
_CHUNK_BYTES = 32 << 20
"""Bytes, about, of experts that are dequantised at a time into the tensor that holds all of them."""


@dataclass(frozen=True)
class Packing:
    """How a flat tensor holds a weight."""

    shape: tuple[int, ...]
    """[N, K], or [E, N, K] of experts."""
    dtype: torch.dtype
    """Of the flat tensor, and of the weight when it is dequantised."""
    planned: bool = False
    """Only memory counts: the library is the stand-in of :mod:`raymem.memory.nf4`, not bitsandbytes."""

    @functools.cached_property
    def sections(self) -> dict[str, tuple[slice, torch.dtype, tuple[int, ...]]]:
        """Map each section to its bytes, dtype and shape."""
        groups = math.ceil(self.blocks / NESTED_BLOCK)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (self.matrices, math.ceil(self.matrix_numel / 2))),
            "scales": (torch.uint8, (self.matrices, groups * NESTED_BLOCK)),
            "nested": (torch.float32, (self.matrices, groups)),
            "offsets": (torch.float32, (self.matrices,)),
            "table": (torch.float32, (16,)),
            "nested_table": (torch.float32, (256,)),
        }
        sections, start = {}, 0
        for name, (dtype, shape) in shapes.items():
            stop = start + math.prod(shape) * dtype.itemsize
            sections[name] = slice(start, stop), dtype, shape
            start = -(-stop // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return sections

    @property
    def matrices(self) -> int:
        return math.prod(self.shape[:-2])

    @property
    def matrix_numel(self) -> int:
        return self.shape[-2] * self.shape[-1]

    @property
    def blocks(self) -> int:
        """Number of blocks of each matrix."""
        return math.ceil(self.matrix_numel / BLOCK)

    @property
    def num_bytes(self) -> int:
        """Bytes of the flat tensor."""
        last: int = max(section.stop for section, _, _ in self.sections.values())
        return -(-last // _ALIGNED_BYTES) * _ALIGNED_BYTES

    def placeholder(self) -> nn.Parameter:
        """Return the flat tensor on the meta device, frozen."""
        flat = torch.empty(self.num_bytes // self.dtype.itemsize, dtype=self.dtype, device="meta")
        return nn.Parameter(flat, requires_grad=False)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the sections of a flat tensor."""
        as_bytes = flat.detach().view(torch.uint8)
        return {name: as_bytes[part].view(dtype).view(shape) for name, (part, dtype, shape) in self.sections.items()}

    @torch.no_grad()
    def pack(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Quantise a weight on ``device`` by bitsandbytes, one matrix at a time.

        Args:
            value: of this shape, in any floating dtype, on any device.
        """
        import bitsandbytes.functional as bnb

        flat = torch.zeros(self.num_bytes // self.dtype.itemsize, dtype=self.dtype, device=device)
        views = self.views(flat)
        for number, matrix in enumerate(value.view(self.matrices, *self.shape[-2:])):
            codes, state = bnb.quantize_4bit(
                matrix.to(device).contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
            views["codes"][number] = codes.view(-1)
            views["scales"][number, : self.blocks] = state.absmax
            views["nested"][number] = state.state2.absmax
            views["offsets"][number] = state.offset
            views["table"].copy_(state.code)
            views["nested_table"].copy_(state.state2.code)
        return flat

    def unpack(self, flat: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return the codes [N K / 2, 1] of a single matrix, and the state by which bitsandbytes reads them."""
        library, views = nf4.library(planned=self.planned), self.views(flat)
        nested = library.QuantState(
            absmax=views["nested"][0], code=views["nested_table"], blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        state = library.QuantState(
            absmax=views["scales"][0, : self.blocks], shape=torch.Size(self.shape), code=views["table"],
            blocksize=BLOCK, quant_type="nf4", dtype=self.dtype, offset=views["offsets"][0], state2=nested,
        )  # fmt: skip
        return views["codes"].view(-1, 1), state

    def dequantise(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the weights of all experts [E, N, K], freshly allocated."""
        library, views = nf4.library(planned=self.planned), self.views(flat)
        nested = library.QuantState(
            absmax=views["nested"].view(-1), code=views["nested_table"], blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        scales_EB = library.dequantize_blockwise(views["scales"].view(-1), nested).view(self.matrices, -1)
        scales_EB += views["offsets"][:, None]
        scales_EB = scales_EB[:, : self.blocks]
        step = max(1, _CHUNK_BYTES // (self.matrix_numel * self.dtype.itemsize))

        def dense(part: slice) -> torch.Tensor:
            codes = views["codes"][part]
            # By blocks, not by rows: on CPUs rows must end where blocks do.
            state = library.QuantState(
                absmax=scales_EB[part].reshape(-1), shape=torch.Size((codes.shape[0] * self.blocks, BLOCK)),
                code=views["table"], blocksize=BLOCK, quant_type="nf4", dtype=self.dtype,
            )  # fmt: skip
            values: torch.Tensor = library.dequantize_4bit(codes.view(-1, 1), state)
            return values.view(-1, *self.shape[1:])

        if step >= self.matrices:
            return dense(slice(0, self.matrices))
        dense_ENK = torch.empty(self.shape, dtype=self.dtype, device=flat.device)
        for start in worth_visiting(range(0, self.matrices, step)):
            part = slice(start, min(self.matrices, start + step))
            dense_ENK[part] = dense(part)
        return dense_ENK


def packing_of(module: nn.Module, attribute: str) -> Packing | None:
    """Return how a parameter of a module is packed; None if it is not."""
    packings: dict[str, Packing] = getattr(module, "packings", {})
    return packings.get(attribute)


class PackedLinear(nf4.Linear4bit):
    """A frozen 4-bit linear layer whose weight is packed, for sharded models.

    Multiplies and differentiates as bitsandbytes' own 4-bit layer does, by the same functions.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, planned: bool) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.packings = {"weight": Packing((out_features, in_features), dtype, planned)}
        self.weight = self.packings["weight"].placeholder()
        self._read: tuple[torch.Tensor, tuple[torch.Tensor, Any]] | None = None
        """The flat tensor that was read last, and its views: FSDP2 gathers into the same memory every time."""

    def packed_weight(self) -> tuple[torch.Tensor, Any] | None:
        if isinstance(self.weight, DTensor):
            return None
        if self._read is None or self._read[0] is not self.weight:
            self._read = self.weight, self.packings["weight"].unpack(self.weight)
        return self._read[1]

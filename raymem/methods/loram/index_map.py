"""Where the rows and columns of a pruned linear layer lie in the full one: slicing, and the scatter back.

Legend: K indices kept along an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from raymem.methods.loram.coupling import Coupling, Side

Kept = Mapping[int, Mapping[str, Sequence[int]]]
"""Ascending kept units by layer and group, for the layers that are pruned."""


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Axis:
    """The indices that are kept along one axis of a full weight."""

    indices_K: torch.Tensor
    """int64 [K]"""
    size: int
    """Size of the axis in the full model."""

    def take(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the kept part of a full tensor."""
        if dim == 1 and tensor.device.type == "cpu":
            bits = tensor.view(_INTEGERS[tensor.element_size()]).numpy()  # torch's own gather takes three times as long
            return torch.from_numpy(bits.take(self.indices_K.numpy(), axis=1)).view(tensor.dtype)
        return tensor.index_select(dim, self.indices_K.to(tensor.device))

    def put(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return a tensor of full size that is ``tensor`` where kept and zero elsewhere; dtype and device stay."""
        shape = list(tensor.shape)
        shape[dim] = self.size
        return tensor.new_zeros(shape).index_copy_(dim, self.indices_K.to(tensor.device), tensor)


@dataclass(frozen=True)
class Placement:
    """The position of a pruned linear layer in the full one; None along an axis that is whole."""

    rows: Axis | None = None
    """Along the outputs: dim 0 of the weight and of ``lora_B``, the bias."""
    columns: Axis | None = None
    """Along the inputs: dim 1 of the weight and of ``lora_A``."""

    def axes(self, parameter: str) -> dict[int, Axis]:
        """Map dimensions of the linear layer's ``weight`` or ``bias`` to axes."""
        axes = {0: self.rows, 1: self.columns if parameter == "weight" else None}
        return {dim: axis for dim, axis in axes.items() if axis is not None}


WHOLE = Placement()


def place(coupling: Coupling, kept: Kept, module: str) -> Placement:
    """Return the placement of a module by its full dotted name, for example ``model.layers.4.self_attn.q_proj``."""
    located = coupling.locate(module)
    if located is None or located[0] not in kept:
        return WHOLE
    layer, path = located
    return Placement(_axis(coupling, kept[layer], path, "out"), _axis(coupling, kept[layer], path, "in"))


def _axis(coupling: Coupling, kept: Mapping[str, Sequence[int]], path: str, side: Side) -> Axis | None:
    coupled = coupling.member(path, side)
    if coupled is None:
        return None
    group, member = coupled
    units = torch.tensor(kept[group.name], dtype=torch.int64)
    return Axis(member.indices(units), group.num_units * member.width)


def take(coupling: Coupling, kept: Kept, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the pruned form of one named parameter of the full model; untouched parameters come back as they are."""
    module, _, parameter = name.rpartition(".")
    for dim, axis in place(coupling, kept, module).axes(parameter).items():
        tensor = axis.take(tensor, dim)
    return tensor


def put(coupling: Coupling, kept: Kept, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Invert :func:`take`, with zeros in the pruned positions."""
    module, _, parameter = name.rpartition(".")
    for dim, axis in place(coupling, kept, module).axes(parameter).items():
        tensor = axis.put(tensor, dim)
    return tensor

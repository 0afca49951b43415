"""The frozen weights of one layer: on the host, and on the device while the layer runs.

Outside of its runs the modules hold the parameters of the host, so that whoever looks at them finds values. For a run
they hold parameters of the device, whose memory is freed and restored by resizing their storage: what autograd has
saved are views of these, which are valid again as soon as the weights are back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from raymem.memory.host import CopyLane, Mark, lives_on_host
from raymem.memory.trace import attributed


@dataclass
class Pair:
    """A parameter on the host, its like on the device, and where modules hold it."""

    host: nn.Parameter
    device: nn.Parameter | None = None
    places: list[tuple[nn.Module, str]] = field(default_factory=list)


class StreamedLayer:
    """The weights of one layer.

    Args:
        name: of the layer.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self._layer = name, layer
        self.needs_backward = False
        """Whether the last forward pass has left something for backward."""
        self.is_here = False
        """Whether the modules hold the parameters of the device."""
        self._is_coming = False
        self._pairs: list[Pair] = []
        self._arrival: Mark = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out what is on the device: a copied or pickled layer begins with its parameters on the host."""
        assert not self.is_here, f"{self.name} cannot be copied while it runs"
        return {**self.__dict__, "_pairs": [], "_is_coming": False, "_arrival": None}

    @property
    def is_on_device(self) -> bool:
        return self.is_here or self._is_coming

    @torch.no_grad()
    def fetch(self, lane: CopyLane, device: torch.device) -> None:
        """Begin to copy the weights to the device, if they are not there."""
        if self.is_on_device:
            return
        pairs = self._pairs or self._find()
        for pair in pairs:
            if pair.device is None:
                with attributed("weights"):
                    empty = torch.empty_like(pair.host, device=device)
                pair.device = nn.Parameter(empty, requires_grad=False)
            else:
                pair.device.untyped_storage().resize_(pair.host.numel() * pair.host.element_size())
            lane.copy(pair.device.data, pair.host.data)  # the data alone: what autograd has saved stays valid
        self._pairs, self._is_coming, self._arrival = pairs, True, lane.mark()

    def arrive(self, lane: CopyLane, device: torch.device) -> None:
        """Let the computation wait for the weights, and the modules hold them."""
        self.fetch(lane, device)
        if self.is_here:
            return
        lane.wait(self._arrival)
        for pair in self._pairs:
            for module, name in pair.places:
                module._parameters[name] = pair.device
        self.is_here, self._is_coming = True, False

    def release(self, lane: CopyLane) -> None:
        """Free the device of the weights."""
        if not self.is_on_device:
            return
        lane.wait(self._arrival)  # memory that is still being written must not be used again
        for pair in self._pairs:
            assert pair.device is not None
            for module, name in pair.places:
                module._parameters[name] = pair.host
            pair.device.untyped_storage().resize_(0)
        self.is_here = self._is_coming = False

    def _find(self) -> list[Pair]:
        pairs: dict[int, Pair] = {}
        for module in self._layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and lives_on_host(parameter):
                    pairs.setdefault(id(parameter), Pair(parameter)).places.append((module, name))
        return list(pairs.values())

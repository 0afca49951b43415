"""Holds what backward needs on the host: out behind the layer that made it, back one layer ahead of backward.

One run of a layer is a group. While a layer runs, the tensors of the one before it are on their way to the host, and go
from the device when the next layer begins; so two layers' tensors are there at a time. Backward of a layer finds its
group on the device, and has that of the layer before it brought meanwhile. The order of the program decides when
anything is freed, not how fast copies are: a plan can foresee it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from raymem.memory.host import CopyLane, Mark
from raymem.memory.trace import attributed
from raymem.methods.layers.saved import Raw
from raymem.private_apis import FakeTensor

SMALLEST_BYTES = 1024
"""Bytes of a storage from which on it is worth a copy."""


class Entry:
    """A storage that backward needs, on the device, on the host or on its way; alive as long as a node needs it.

    Args:
        tensor: part of it.
    """

    def __init__(self, group: Group, tensor: torch.Tensor, lane: CopyLane) -> None:
        # The whole storage in its order: a kernel may round by how its operands lie in memory.
        flat = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
        self.group = group
        self.device: torch.Tensor | None = flat
        self.host: torch.Tensor | None = lane.to_host(flat)
        self.version = tensor._version
        self.changed = False

    def leave(self) -> None:
        """Give up the storage on the device, from which the copy has been taken."""
        if self.device is not None:
            self.changed = self.device._version != self.version
            self.device = None

    def come_back(self, lane: CopyLane) -> torch.Tensor | None:
        """Begin to copy it to the device, and return that; None if it is there already."""
        if self.device is not None:
            return None
        assert self.host is not None
        self.device, self.host = lane.to_device(self.host), None
        self.version = self.device._version
        return self.device


class Packed:
    """One tensor that autograd saved: a view of an entry."""

    def __init__(self, entry: Entry, tensor: torch.Tensor) -> None:
        self._entry = entry
        self._geometry = (tensor.size(), tensor.stride(), tensor.storage_offset())

    def restore(self) -> torch.Tensor:
        entry = self._entry
        entry.group.consume()
        assert entry.device is not None
        if entry.changed or entry.device._version != entry.version:
            raise RuntimeError(
                f"a tensor {list(self._geometry[0])} that backward needs was changed in place after it was saved; "
                "with activations: none PyTorch would refuse that too"
            )
        return entry.device.as_strided(*self._geometry)


class Group:
    """The entries of one run of a layer."""

    def __init__(self, offload: Offload, previous: Group | None) -> None:
        self._offload, self._lane = offload, offload.lane
        self._previous = None if previous is None else weakref.ref(previous)
        self._entries: dict[Any, weakref.ref[Entry]] = {}
        self._out: Mark = None
        self._back: Mark = None
        self._consumed = False
        self.coming: list[torch.Tensor] = []
        """What is being copied to the device: to be kept until the computation waits for it."""

    def pack(self, tensor: torch.Tensor) -> Packed:
        """Hold a tensor; its storage travels once, however many operations save parts of it."""
        key = (tensor.untyped_storage()._cdata, tensor._version, tensor.dtype)
        known = self._entries.get(key)
        entry = None if known is None else known()
        if entry is None:
            entry = Entry(self, tensor, self._lane)
            self._entries[key] = weakref.ref(entry)
        return Packed(entry, tensor)

    def close(self) -> None:
        """End the run of the layer."""
        self._out = self._lane.mark()

    def leave(self) -> None:
        """Free the device of what has been copied to the host."""
        self._lane.wait(self._out)
        for entry in self._alive():
            entry.leave()

    def come_back(self) -> None:
        """Begin to copy to the device what backward will need next."""
        with attributed("activations"), torch.no_grad():
            brought = [entry.come_back(self._lane) for entry in self._alive()]
        self.coming += [tensor for tensor in brought if tensor is not None]
        self._back = self._lane.mark()
        self._offload.coming.append(self)

    def arrive(self) -> None:
        """Let the computation wait for what is being copied."""
        self._lane.wait(self._back)
        self.coming.clear()

    def consume(self) -> None:
        """Have everything on the device, and begin with the group before; called by each tensor of the group."""
        if self._consumed:
            return
        self._consumed = True
        self._lane.wait(self._out)  # what is still here may be freed from now on
        if self not in self._offload.coming:
            self.come_back()
        self._offload.coming.remove(self)
        self.arrive()
        previous = None if self._previous is None else self._previous()
        if previous is not None:
            previous.come_back()

    def _alive(self) -> list[Entry]:
        return [entry for reference in self._entries.values() if (entry := reference()) is not None]


class Offload:
    """The groups of one model on one device, in the order in which its layers run.

    Args:
        lane: takes the copies.
    """

    def __init__(self, lane: CopyLane) -> None:
        self.lane = lane
        self.coming: list[Group] = []
        """The groups that are being copied to the device."""
        self._leaving: list[Group] = []
        self._last: weakref.ref[Group] | None = None

    @contextlib.contextmanager
    def layer(self, staying: Collection[int], device: torch.device) -> Iterator[None]:
        """Hold what autograd saves in the block on the host.

        Args:
            staying: storages, by address, that live on the device anyway: weights, and what all layers are given.
            device: of the tensors that are moved.
        """
        while self.coming:  # a backward pass ended before its time
            self.coming.pop().arrive()
        while len(self._leaving) > 1:
            self._leaving.pop(0).leave()
        group = Group(self, None if self._last is None else self._last())

        def pack(tensor: torch.Tensor) -> Packed | Raw:
            moves = _is_plain(tensor, device) and tensor.untyped_storage()._cdata not in staying
            return group.pack(tensor) if moves else Raw(tensor)

        with saved_tensors_hooks(pack, _restore):
            yield
        group.close()
        self._leaving.append(group)
        self._last = weakref.ref(group)


def _restore(held: Packed | Raw) -> torch.Tensor:
    return held.restore()


def _is_plain(tensor: torch.Tensor, device: torch.device) -> bool:
    """Say whether a tensor is a dense one of the device, and large enough."""
    if not isinstance(tensor, FakeTensor) and type(tensor) is not torch.Tensor:
        return False
    if tensor.layout is not torch.strided or tensor.device != device or tensor.is_complex() or tensor.is_neg():
        return False
    size = tensor.untyped_storage().nbytes()
    return size >= SMALLEST_BYTES and size % tensor.element_size() == 0

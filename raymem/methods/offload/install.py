"""Installs offloading in a model, and undoes it."""

from __future__ import annotations

import inspect
import logging
from types import TracebackType
from typing import Any

import torch
from torch import nn

from raymem.errors import ModelError
from raymem.linalg.local import local
from raymem.memory.host import CopyLane
from raymem.memory.target import holds_no_values
from raymem.methods.layers.find import transformer_layers
from raymem.methods.offload.saved import Offload
from raymem.private_apis import tree_leaves

log = logging.getLogger(__name__)

_CHECKPOINT = "_gradient_checkpointing_func"
"""The function with which transformers checkpoints a layer."""


def offload_activations(model: nn.Module) -> Handle:
    """Hold what the layers of a model save for backward in the memory of the host, from now on, in any training loop.

    Where transformers' activation checkpointing is on (``model.activation_checkpointing_enable()`` before this call),
    that is the input of each layer.

    Args:
        model: a transformer of transformers or plain PyTorch, also wrapped by PEFT or sharded by FSDP2.

    Returns:
        A handle; ``handle.remove()`` undoes it, and so does leaving it as a context manager.

    Raises:
        ModelError: no layers were found, or it is installed already.
    """
    return Handle(model)


class Handle:
    """A model whose activations are offloaded; made by :func:`offload_activations`."""

    def __init__(self, model: nn.Module) -> None:
        layers = transformer_layers(model)
        if not layers:
            raise ModelError(
                f"offload: no transformer layers were found in {type(model).__name__}, so nothing would be moved to "
                "the host; use activations: none"
            )
        groups = Groups()
        self._patches = [Patch(name, layer, groups) for name, layer in layers.items()]
        first = next(model.parameters())
        if not holds_no_values(local(first)) and first.device.type == "cpu":
            log.warning("offload: a CPU has one memory, so that copies of activations take time and save nothing")

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Undo the installation; a backward pass of an earlier forward pass still works."""
        for patch in self._patches:
            patch.remove()


class Groups:
    """Makes the order of layers when the first of them runs: a copied or pickled model has an order of its own."""

    def __init__(self) -> None:
        self._offload: Offload | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_offload": None}

    def of(self, device: torch.device) -> Offload:
        self._offload = self._offload or Offload(CopyLane(device))
        return self._offload


class Patch:
    """Stands for the ``forward`` of a layer, or for the function that checkpoints it.

    Args:
        name: of the layer.
    """

    def __init__(self, name: str, layer: nn.Module, groups: Groups) -> None:
        for attribute in ("forward", _CHECKPOINT):
            if isinstance(layer.__dict__.get(attribute), Patch):
                raise ModelError(f"{name}: the activations of this model are offloaded already; call remove() first")
        self._name, self._layer, self._groups = name, layer, groups
        checkpointed = getattr(layer, "gradient_checkpointing", False)
        self._attribute = _CHECKPOINT if checkpointed else "forward"
        self._was_set = self._attribute in layer.__dict__
        self._inner: Any = getattr(layer, self._attribute)
        if not checkpointed:
            self.__signature__ = inspect.signature(self._inner)
        self._removed = False
        setattr(layer, self._attribute, self)

    def remove(self) -> None:
        """Take it out. Under a patch of somebody else this one stays, but only passes through."""
        self._removed = True
        if self._layer.__dict__.get(self._attribute) is not self:
            return
        if self._was_set:
            setattr(self._layer, self._attribute, self._inner)
        else:
            delattr(self._layer, self._attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed or not torch.is_grad_enabled():
            return self._inner(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not tensors:
            raise ModelError(f"{self._name}: {type(self._layer).__name__} was called without a tensor")
        # The first are the hidden states, which no other layer is given.
        staying = [*tensors[1:], *self._layer.parameters(), *self._layer.buffers()]
        storages = {local(tensor).untyped_storage()._cdata for tensor in staying}
        with self._groups.of(tensors[0].device).layer(storages, tensors[0].device):
            return self._inner(*args, **kwargs)

"""Streams the layers of a model: each arrives one ahead of the computation, forward and backward."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from raymem.errors import ModelError
from raymem.memory.host import CopyLane, keep_on_host
from raymem.memory.target import holds_no_values
from raymem.methods.layers.find import transformer_layers
from raymem.methods.streaming.layer import StreamedLayer
from raymem.private_apis import in_backward, tree_leaves

log = logging.getLogger(__name__)


def stream_layers(model: nn.Module) -> None:
    """Let the weights of the transformer layers of a model live on the host, and come to the device when layers run.

    To be called before an adapter is added to the layers, whose weights stay on the device. The layers' own become
    frozen and are marked; they are still to be allocated, by :func:`raymem.memory.host.host_like`.

    Args:
        model: on the meta device.

    Raises:
        ModelError: no layers were found.
    """
    layers = transformer_layers(model)
    if not layers:
        raise ModelError(
            f"offload: no transformer layers were found in {type(model).__name__}, so nothing would live on the host; "
            "use base.offload: false"
        )
    stream = Stream(layers)
    for number, layer in enumerate(layers.values()):
        for parameter in layer.parameters():
            keep_on_host(parameter)
        layer.register_forward_pre_hook(_Before(stream, number), with_kwargs=True)
        layer.register_forward_hook(_After(stream, number), always_call=True)


class Stream:
    """The layers of one model in the order in which they run."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self._layers = [StreamedLayer(name, layer) for name, layer in layers.items()]
        self._lane: CopyLane | None = None
        self._device = torch.device("cpu")
        self._ends_with_backward = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lane": None}

    def before(self, number: int, tensor: torch.Tensor) -> None:
        """Have the weights of a layer where its input is, and begin with those of the next."""
        if in_backward():  # checkpointing runs it again, and its weights are there
            return
        self._ends_with_backward, device = False, tensor.device  # backward may have ended with an error
        if self._lane is None or self._device != device:
            self._lane, self._device = CopyLane(device), device
            if device.type == "cpu" and not holds_no_values(tensor):
                log.warning("base.offload: a CPU has one memory, so that copies of weights take time and save nothing")
        self._keep(number, number + 1)
        self._layers[number].arrive(self._lane, device)
        if number + 1 < len(self._layers):
            self._layers[number + 1].fetch(self._lane, device)

    def after(self, number: int, outputs: list[torch.Tensor]) -> None:
        """End the forward pass of a layer: its weights go, unless it is the last one, with which backward begins."""
        if in_backward():
            return
        assert self._lane is not None
        layer, wanted = self._layers[number], [tensor for tensor in outputs if tensor.requires_grad]
        layer.needs_backward = bool(wanted)
        for tensor in wanted:
            tensor.register_hook(_Backward(self, number))  # type: ignore[no-untyped-call]
        if not wanted or number + 1 < len(self._layers):
            layer.release(self._lane)

    def backward(self, number: int) -> None:
        """Have the weights of a layer, whose output has its gradient, on the device; begin with the layer before."""
        assert self._lane is not None
        if not self._ends_with_backward:
            self._ends_with_backward = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end)
        previous = number - 1 if number and self._layers[number - 1].needs_backward else number
        self._keep(number, previous)
        self._layers[number].arrive(self._lane, self._device)
        self._layers[previous].fetch(self._lane, self._device)

    def _end(self) -> None:
        self._ends_with_backward = False
        self._keep()

    def _keep(self, *numbers: int) -> None:
        """Release all layers but these."""
        assert self._lane is not None
        for number, layer in enumerate(self._layers):
            if number not in numbers:
                layer.release(self._lane)


class _Before:
    """A hook as an object, so that it is copied and pickled with its module."""

    def __init__(self, stream: Stream, number: int) -> None:
        self._stream, self._number = stream, number

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stream.before(self._number, _tensors((args, kwargs))[0])


class _After(_Before):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stream.after(self._number, _tensors(output))


class _Backward(_Before):
    def __call__(self, gradient: torch.Tensor) -> None:  # type: ignore[override]
        self._stream.backward(self._number)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]

"""A model run one decoder layer at a time, so that only one layer's weights are ever in memory.

What a layer is called with beside the hidden states (masks, rotary embeddings, positions) depends on the text length
only. It is recorded by running the stock model on *hollow* weights: a tensor of full shape over a single zero. So any
architecture's own code decides it, and no weight is read. All arithmetic here is in fp32.

Legend: n texts, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raymem.methods.chunked_loss import choose, chunked_loss_sum
from raymem.methods.loram.coupling import Coupling, couple
from raymem.methods.loram.source import Source

_NOT_PASSED = frozenset({"past_key_values", "past_key_value", "layer_past", "use_cache"})


class _Recorded(Exception):
    """Ends the forward pass when the last layer was called."""


class LayerwiseModel:
    """The unpruned model of a source, its layers without weights until one is loaded.

    Args:
        length: tokens of every text.
        device: where layers run.
    """

    def __init__(self, source: Source, length: int, device: torch.device | str = "cpu") -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        self.source = source
        self.device = torch.device(device)
        config = source.config()
        self.coupling: Coupling = couple(config)
        with init_empty_weights(include_buffers=False), no_init_weights():  # computed buffers (rotary) are real
            self._model: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            ).eval()
        self._model.requires_grad_(False)
        self._model.tie_weights()
        self._filled: list[str] = []
        self._layers: nn.ModuleList = self._model.get_submodule(self.coupling.layers)
        self._rest = [name for name, parameter in self._model.named_parameters() if self.coupling.locate(name) is None]
        self._hollow(self._rest)
        for name, buffer in self._model.named_buffers():
            if self.coupling.locate(name) is None:
                _assign(self._model, name, buffer.to(self.device))
        self._calls = self._record(length)
        self._loss = choose(self._model)

    def embed(self, ids_nT: torch.Tensor) -> torch.Tensor:
        """Return the input of the first layer, [n, T, H].

        Reads everything outside the layers but the output head; :meth:`drop_rest` forgets it.
        """
        self._fill(self._without(self._model.get_output_embeddings()))
        embedded: list[torch.Tensor] = []
        self._run_until_layer(0, lambda hidden, args, kwargs: embedded.append(hidden.detach()), ids_nT)
        return embedded[0]

    def loss_gradient(self, hidden_1TH: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
        """Gradient [1, T, H] of the mean next-token loss of one text with respect to the last layer's output.

        Reads everything outside the layers but the input embedding (unless it is tied); :meth:`drop_rest` forgets it.
        """
        assert self._loss.chunked, f"every family that can be pruned has a chunked loss: {self._loss.reason}"
        self._fill(self._without(self._model.get_input_embeddings()))
        hidden_1TH = hidden_1TH.detach().to(self.device).requires_grad_(True)
        inputs = torch.zeros(1, len(ids_T), self._model.get_input_embeddings().embedding_dim, device=self.device)
        with _calling(self._layers, lambda layer, hidden, args, kwargs: hidden_1TH):
            positions = torch.arange(len(ids_T) - 1, device=self.device)
            following = ids_T.roll(-1).to(self.device)  # the last one wraps around and does not count
            model_inputs = {"inputs_embeds": inputs, "use_cache": False}
            loss = chunked_loss_sum(self._model, model_inputs, following, positions, replay=self._loss.replay)
            torch.autograd.backward(loss / len(positions))
        assert hidden_1TH.grad is not None
        return hidden_1TH.grad

    def drop_rest(self) -> None:
        """Forget the weights outside the layers."""
        self._hollow(self._rest)
        self._filled = []

    def load_layer(self, layer: int) -> nn.Module:
        """Return a decoder layer with its weights in fp32; it keeps them until :meth:`drop_layer`."""
        module, prefix = self._layers[layer], self.coupling.prefix(layer)
        for name, _ in list(module.named_parameters()):
            _assign(module, name, self._read(prefix + name).to(self.device))
        module.to(self.device)
        return module

    def drop_layer(self, layer: int) -> None:
        """Forget the weights of a layer."""
        for name, parameter in list(self._layers[layer].named_parameters()):
            _assign(self._layers[layer], name, parameter.detach().to("meta"))

    def run_layer(self, layer: int, hidden_nTH: torch.Tensor) -> torch.Tensor:
        """Output [n, T, H] of a loaded layer for some texts, called as the stock model would."""
        args, kwargs = self._calls[layer]
        output = self._layers[layer](hidden_nTH.to(self.device), *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _record(self, length: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, {name: value for name, value in kwargs.items() if name not in _NOT_PASSED}))

        self._run_until_layer(len(self._layers) - 1, record, torch.zeros(1, length, dtype=torch.int64))
        return calls

    @torch.no_grad()
    def _run_until_layer(
        self,
        last: int,
        see: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], None],
        ids_nT: torch.Tensor,
    ) -> None:
        """Run the stock model with layers that return their input; ends when layer ``last`` was called."""

        def call(layer: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            see(hidden, args, kwargs)
            if layer == last:
                raise _Recorded
            return hidden

        with _calling(self._layers, call):
            try:
                self._model(input_ids=ids_nT.to(self.device), use_cache=False)
            except _Recorded:
                return
        raise AssertionError("the model never called its last layer")

    def _without(self, module: nn.Module) -> list[str]:
        """Return names outside the layers, less the parameters of one module that shares none with another in use."""
        tied = self._model.get_input_embeddings().weight is self._model.get_output_embeddings().weight
        skipped = set() if tied else {id(parameter) for parameter in module.parameters()}
        parameters = dict(self._model.named_parameters())
        return [name for name in self._rest if id(parameters[name]) not in skipped]

    def _fill(self, names: list[str]) -> None:
        """Give exactly these parameters outside the layers their values; the others become hollow."""
        if self._filled == names:
            return
        self._hollow([name for name in self._rest if name not in names])
        for name in names:
            stored = self.source.stored_name(self._model, name)
            assert stored is not None, name  # checked when the source was opened
            _assign(self._model, name, self._read(stored).to(self.device))
        self._model.tie_weights()
        self._filled = names

    def _hollow(self, names: list[str]) -> None:
        shapes = {name: parameter.shape for name, parameter in self._model.named_parameters()}
        for name in names:
            _assign(self._model, name, torch.zeros((), device=self.device).expand(shapes[name]))
        self._model.tie_weights()

    def _read(self, name: str) -> torch.Tensor:
        return self.source.read(name).float()


class _calling:
    """Inside, decoder layers do what ``call(layer, hidden, args, kwargs)`` does, without weights."""

    def __init__(
        self,
        layers: nn.ModuleList,
        call: Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor],
    ) -> None:
        self._layers, self._call = layers, call

    def __enter__(self) -> None:
        for index, layer in enumerate(self._layers):
            layer.forward = lambda hidden, *args, _index=index, **kwargs: self._call(_index, hidden, args, kwargs)

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            del layer.forward


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a named parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value

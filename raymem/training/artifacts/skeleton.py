"""A base model without its matrices: modules, shapes and dtypes as PEFT wants to see them, beside the files of values.

A matrix is one zero, seen with strides of 0: PEFT builds its layers beside it as beside a real one, on the same device
and of the same dtype. What it is worth is read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raymem.account import refuse_not_finite
from raymem.storage.safetensors_io import DTYPES, Entry, read_header, read_tensor, shard_files
from raymem.training.artifacts.load import on_meta, read_config
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import fetch
from raymem.training.model.weights import NOT_FINITE, Slot, check_checkpoint, slots, tied_names


class Skeleton:
    """The base of an adapter, its model built and its files opened."""

    model: Any
    """On the CPU; tables that follow from the config are on the meta device."""
    directory: Path
    entries: Mapping[str, Entry]
    """Key in the files -> position, in the order of the files; without what is of no use."""
    places: Mapping[str, Slot]
    """Name in the model -> module and attribute that hold a tensor, also under an adapter."""
    ties: Mapping[str, str]
    """Name -> another name of the same tensor."""

    def __init__(self, adapter: Path, name: str, revision: str | None) -> None:
        """Build it.

        Args:
            adapter: directory of the PEFT adapter. What its file holds of the base's own parameters (trained biases,
                saved modules) gets memory, to be written to.
            name: of the base, with its revision.

        Raises:
            ModelError: the base cannot be loaded, or not every tensor of its files has a place.
        """
        config = read_config(name, revision)
        self.directory = fetch(name, revision, DistEnv(), weights_too=True)
        self.model = on_meta(config)
        names = check_checkpoint(self.model, self.directory)
        headers = (read_header(self.directory, file)[1] for file in shard_files(self.directory))
        self.entries = {key: entry for entries in headers for key, entry in entries.items() if key in names}
        self.places, self.ties = slots(self.model), tied_names(self.model)
        self._names = {key: name for key, name in names.items() if name is not None}
        self._keys = {name: key for key, name in self._names.items()}
        given = read_header(adapter, "adapter_model.safetensors")[1]
        self._fill({key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in given})

    @torch.no_grad()
    def _fill(self, given: set[str]) -> None:
        values: dict[int, torch.Tensor] = {}
        self._without_memory: dict[str, torch.Tensor] = {}
        for name, (module, attribute) in self.places.items():
            old = getattr(module, attribute)
            if id(old) not in values:
                key = self.key_of(name)
                if key is not None and (old.dim() < 2 or name in given or attribute in module._buffers):
                    value = self.read(key)
                else:
                    dtype = old.dtype if key is None else DTYPES[self.entries[key].dtype]
                    value = torch.zeros((), dtype=dtype).expand(old.shape)
                values[id(old)] = nn.Parameter(value, requires_grad=False) if attribute in module._parameters else value
            setattr(module, attribute, values[id(old)])
            if not _has_memory(values[id(old)]):
                self._without_memory[name] = values[id(old)]

    def key_of(self, name: str) -> str | None:
        """Return the key under which a tensor of the model is stored, its own or that of a tied one; None if it is
        converted while loading.
        """
        others = [a if b == name else b for a, b in self.ties.items() if name in (a, b)]
        return next((self._keys[one] for one in (name, *others) if one in self._keys), None)

    def name_of(self, key: str) -> str | None:
        """Return the name in the model of a tensor of the files; None if it is converted while loading."""
        return self._names.get(key)

    def read(self, key: str, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Read a tensor of the files, into ``memory`` as :func:`raymem.storage.safetensors_io.read_tensor` does.

        Raises:
            ModelError: it cannot be read, or a number in it is nan or infinite.
        """
        return refuse_not_finite(read_tensor(self.directory, self.entries[key], memory), f"tensor {key}", NOT_FINITE)

    def has_memory(self, name: str) -> bool:
        """Whether a tensor of the model has its value, or the one that the adapter brought."""
        return name not in self._without_memory

    def take_memory(self, name: str) -> None:
        """Give the memory of a matrix back."""
        module, attribute = self.places[name]
        setattr(module, attribute, self._without_memory[name])

    def is_untouched(self) -> bool:
        """Whether all matrices are as they were made: an adapter may change them when it is attached."""
        return all(
            getattr(module, attribute) is self._without_memory[name] and not _has_memory(self._without_memory[name])
            for name, (module, attribute) in self.places.items()
            if name in self._without_memory
        )


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= 1 or tensor.untyped_storage().nbytes() > tensor.element_size()

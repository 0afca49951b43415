"""A model on disk seen through its headers: which tensor lies where, and what identifies the whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raymem.account import Header, refuse_two_places, refuse_untied, unused
from raymem.errors import ModelError
from raymem.methods.loram.coupling import Coupling, couple
from raymem.methods.loram.nonuniform import meta_model, read_config
from raymem.storage.checksums import check_files
from raymem.storage.remote.files import directory_at
from raymem.storage.safetensors_io import Entry, fingerprint, read_header, read_tensor, shard_files


@dataclass(frozen=True)
class Source:
    """A model directory, opened. Plain values only: it travels between processes; weights are read where needed."""

    directory: str
    """The files beside the weights: ``config.json``, the index, the tokenizer."""
    name: str
    """Hugging Face id or path under which others know the model."""
    revision: str | None
    tensors: Mapping[str, Entry]
    """Parameter (or buffer) name in the model -> where it lies; names in the files may differ (old checkpoints)."""
    identity: Mapping[str, Any]
    """Identifies the content: fingerprints of all weight files and the digest of ``config.json``."""
    weights: str
    """The directory of the weights, or their address; see :func:`raymem.storage.remote.files.directory_at`."""

    def config(self) -> Any:
        """Return the transformers config."""
        return read_config(self.directory)

    def stored_name(self, model: Any, name: str) -> str | None:
        """Return the name under which a parameter of ``model`` (built from this config) is stored: of tied ones any may
        be.
        """
        if name in self.tensors:
            return name
        ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        others = [origin if name == target else target for target, origin in ties.items() if name in (target, origin)]
        return next((other for other in others if other in self.tensors), None)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in its stored dtype."""
        return read_tensor(directory_at(self.weights), self.tensors[name])

    def layer(self, coupling: Coupling, layer: int) -> dict[str, Entry]:
        """Return the tensors of one decoder layer, by full name."""
        prefix = coupling.prefix(layer)
        return {name: entry for name, entry in self.tensors.items() if name.startswith(prefix)}

    def rest(self, coupling: Coupling) -> dict[str, Entry]:
        """Return the tensors outside the decoder layers: embeddings, last norm, output head."""
        return {name: entry for name, entry in self.tensors.items() if coupling.locate(name) is None}


def open_source(
    directory: str | Path, name: str | None = None, revision: str | None = None, *, weights: str | None = None
) -> Source:
    """Open a model directory (pruned ones too); only headers and samples are read.

    Args:
        name: Hugging Face id, if the directory is a download; by default its absolute path.
        revision: commit of that id.
        weights: where the weights lie, if not in that directory.

    Raises:
        ModelError: no such model, unknown architecture, a shard is missing or truncated, tensors are missing or do not
            fit ``config.json``, are stored in fewer bits, or are not known to be of no use.
    """
    directory = Path(directory).absolute()
    weights = weights or str(directory)
    place = directory_at(weights)
    check_files(directory, ModelError, weights=False)
    config = read_config(directory)
    couple(config)  # an unknown architecture is refused before anything is read
    model = meta_model(config)
    files = shard_files(directory, place)
    entries = [entry for file in files for entry in read_header(place, file)[1].values()]
    on_disk = {entry.key: entry for entry in entries}
    names = _model_names(model, list(on_disk))
    refuse_two_places(directory, [(names[entry.key], entry.key, entry.file) for entry in entries])
    account = {key: (names[key], Header(entry.dtype, entry.shape)) for key, entry in on_disk.items()}
    useless = unused(model, directory, account)
    tensors = {names[key]: entry for key, entry in on_disk.items() if key not in useless}
    identity = {
        "config_sha256": hashlib.sha256((directory / "config.json").read_bytes()).hexdigest(),
        "files": {file: fingerprint(place, file) for file in files},
    }
    source = Source(str(directory), name or str(directory), revision, tensors, identity, weights)
    _check_complete(source, model)
    refuse_untied(model, directory, tensors, source.read)
    return source


def _model_names(model: Any, keys: list[str]) -> dict[str, str]:
    """Key in the files -> name in the model, by transformers' own renaming.

    Raises:
        ModelError: loading would also have to compute (fused experts, quantised checkpoints).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    names = {}
    for key in keys:
        name, computed = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if computed is not None:
            raise ModelError(
                f"model.name: tensor {key} is converted while loading, so its rows cannot be pruned on disk; load the "
                "model with transformers and save it again with save_pretrained"
            )
        names[key] = str(name)
    return names


def _check_complete(source: Source, model: Any) -> None:
    for name, expected in model.state_dict().items():
        stored = source.stored_name(model, name)
        if stored is None:
            raise ModelError(f"model.name: {source.directory} lacks tensor {name}; it is incomplete: fetch it again")
        if (shape := source.tensors[stored].shape) != tuple(expected.shape):
            raise ModelError(
                f"model.name: tensor {stored} in {source.directory} has shape {list(shape)} but config.json describes "
                f"{list(expected.shape)}; config and weights do not belong together"
            )

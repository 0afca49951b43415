"""Models whose decoder layers have sizes of their own, on the stock model code of transformers.

``config.json`` of a pruned model keeps every value of the full model and adds
``"raymem_pruning": {"4": {"attn": 2, "mlp": 4300}, ...}``: kept units of the layers that were pruned. A layer is built
with the full config and then its coupled linear layers are replaced by smaller ones, so nothing that derives from the
config (head size, rotary embedding, caches, validation) changes.

transformers has a registry for such replacements (``monkey_patching``); it is global, outlives its use and stays in
force after an error, and ``output_hidden_states`` of models built earlier no longer finds their layers. So the class is
exchanged in its module only while a model is built.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raymem.account import refuse_quantised
from raymem.errors import ModelError
from raymem.methods.loram.coupling import couple, family_of
from raymem.methods.own_code import built_in_only
from raymem.methods.probe import first_line
from raymem.text import shown

PRUNING_KEY = "raymem_pruning"
"""Key in ``config.json``; its value is layer -> group -> number of kept units."""

Counts = Mapping[int, Mapping[str, int]]
"""Layer -> group -> number of kept units, of the layers that are pruned."""


def with_counts(config: Any, counts: Counts) -> Any:
    """Return a copy of a full model's config that describes the pruned model."""
    pruned = copy.deepcopy(config)
    setattr(pruned, PRUNING_KEY, {str(layer): dict(kept) for layer, kept in sorted(counts.items())})
    return pruned


def without_counts(config: Any) -> Any:
    """Return a copy of a pruned model's config that describes the full model."""
    full = copy.deepcopy(config)
    if hasattr(full, PRUNING_KEY):
        delattr(full, PRUNING_KEY)
    return full


def counts_of(config: Any) -> dict[int, dict[str, int]]:
    """Return the counts that :func:`with_counts` wrote; empty for a model that is not pruned.

    Raises:
        ModelError: somebody has changed them.
    """
    raw = getattr(config, PRUNING_KEY, None) or {}
    try:
        counts = {int(layer): dict(kept) for layer, kept in raw.items()}
        if not all(type(units) is int and units > 0 for kept in counts.values() for units in kept.values()):
            raise ValueError
    except (TypeError, ValueError, AttributeError):
        raise ModelError(
            f"model.name: config.json: {PRUNING_KEY} is {shown(raw)} in place of counts of units by layer; prune again"
        ) from None
    return counts


@contextlib.contextmanager
def pruned_layers(config: Any) -> Iterator[None]:
    """Inside, transformers builds the layers that ``config`` says are pruned with their own sizes.

    Around ``from_config``, ``from_pretrained`` or a bare constructor, on any device. A config of an unpruned model
    needs nothing and changes nothing.

    Raises:
        ModelError: a pruned config of an unknown architecture.
    """
    if not counts_of(config):
        yield
        return
    family = family_of(config)
    module: Any = importlib.import_module(f"transformers.models.{family.package}.modeling_{family.package}")
    original = getattr(module, family.layer_class)
    setattr(module, family.layer_class, _resizing(original))
    try:
        yield
    finally:
        setattr(module, family.layer_class, original)


def from_config(config: Any, **options: Any) -> Any:
    """Return ``AutoModelForCausalLM.from_config`` for pruned and full configs alike."""
    from transformers import AutoModelForCausalLM

    with built_in_only(getattr(config, "_name_or_path", "")), pruned_layers(config):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def load_pruned(directory: str | Path, **options: Any) -> Any:
    """Return ``AutoModelForCausalLM.from_pretrained`` for a pruned model.

    Args:
        directory: what :func:`raymem.methods.loram.prune_model` wrote, or such a model saved again.
        options: as of ``from_pretrained`` (``dtype``, ``device_map``, ``quantization_config``, ...).

    Raises:
        ModelError: the directory holds no config of transformers.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(directory)
    with built_in_only(directory), pruned_layers(config):
        return AutoModelForCausalLM.from_pretrained(
            directory, config=config, local_files_only=True, trust_remote_code=False, **options
        )


def read_config(directory: str | Path) -> Any:
    """Return the transformers config of a model directory.

    Raises:
        ModelError: it cannot be read, or the model is quantised.
    """
    from transformers import AutoConfig

    if not (Path(directory) / "config.json").is_file():
        raise ModelError(f"model.name: {directory} has no config.json; give a directory that save_pretrained wrote")
    try:
        with built_in_only(directory):
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # a config's own class may raise anything about its values
        raise ModelError(f"model.name: {directory}/config.json cannot be used: {first_line(error)}") from None
    refuse_quantised(config, directory)
    return config


def meta_model(config: Any) -> Any:
    """Return the model on the meta device: names and shapes, no weights; tied parameters are one."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = from_config(config)
    model.tie_weights()  # part of the initialisation that was left out
    return model


def _resizing(layer_class: Any) -> Any:
    """Return a subclass that shrinks itself. The name stays: device maps and FSDP policies match by it."""

    def __init__(self: Any, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        layer_class.__init__(self, config, layer_idx, *args, **kwargs)
        kept = counts_of(config).get(layer_idx)
        if kept is not None:
            _resize(self, config, kept)

    members = {"__init__": __init__, "__module__": layer_class.__module__, "__qualname__": layer_class.__qualname__}
    return type(layer_class.__name__, (layer_class,), members)


def _resize(layer: nn.Module, config: Any, kept: Mapping[str, int]) -> None:
    groups = couple(config).groups
    if kept.keys() != {group.name for group in groups}:
        names = ", ".join(group.name for group in groups)
        raise ModelError(
            f"model.name: config.json: {PRUNING_KEY} has {shown(list(kept))} in place of {names}; prune again"
        )
    for group in groups:
        for member in group.members:
            linear = layer.get_submodule(member.module)
            assert isinstance(linear, nn.Linear), member.module
            size = kept[group.name] * member.width
            inputs, outputs = linear.in_features, linear.out_features
            inputs, outputs = (inputs, size) if member.side == "out" else (size, outputs)
            weight = linear.weight
            smaller = nn.Linear(inputs, outputs, linear.bias is not None, device=weight.device, dtype=weight.dtype)
            layer.set_submodule(member.module, smaller)
    if (adjust := family_of(config).adjust) is not None:
        adjust(layer, config, kept["attn"])

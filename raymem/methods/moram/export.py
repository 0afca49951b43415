"""Exports of a MoRAM adapter for tools that do not know it: SHiRA exactly, LoRA approximately, or merged weights.

Merging is PEFT's ``merge_and_unload``. SHiRA (Bhardwaj et al. 2024) in stock PEFT holds values at fixed places, so that
the update's values at the selected places are the same update. A LoRA is the best approximation of its rank and no
more: masking makes the update full rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from raymem.errors import AdapterError
from raymem.methods.moram.base import base_weight
from raymem.methods.moram.layer import MoRAMLinear, layers
from raymem.storage.permissions import by_umask

# O outputs, I inputs, R rank of the LoRA, K connections per row, N values of a layer

_PREFIX = "base_model.model."


def export_shira(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> Path:
    """Write the update as a PEFT SHiRA adapter: the very same update in stock PEFT.

    SHiRA gives every layer ``r (O + I)`` values with one r for all; what a layer does not need is filled with zeros.

    Raises:
        AdapterError: no such adapter, no connections yet, a layer that is no plain linear one, or so high a density
            that SHiRA has no r for it.
    """
    from peft import ShiraConfig

    named_layers = _found(model, adapter_name)
    for name, layer in named_layers:
        if base_weight(layer.get_base_layer()).transposed:
            raise AdapterError(f"{name}: SHiRA in PEFT has no Conv1D; merge the adapter instead")
    r = max(_shira_r(layer, adapter_name) for _, layer in named_layers)
    tensors = {}
    for name, layer in named_layers:
        outputs, inputs = layer.out_features, layer.in_features
        if r * (outputs + inputs) > outputs * inputs:
            raise AdapterError(
                f"{name}: SHiRA would need r={r} for the widest layer, which is more values than this layer's "
                f"{outputs} x {inputs} has; export a lower density or fewer kinds of layers, or merge the adapter"
            )
        values_OK, index_OK = layer.selected_delta(adapter_name), layer.moram_index[adapter_name]
        values_N = values_OK.new_zeros(r * (outputs + inputs))
        places_2N = index_OK.new_zeros(2, len(values_N))
        values_N[: values_OK.numel()] = values_OK.flatten()
        rows_O = torch.arange(outputs, dtype=index_OK.dtype, device=index_OK.device)
        places_2N[0, : index_OK.numel()] = rows_O.repeat_interleave(index_OK.shape[1])
        places_2N[1, : index_OK.numel()] = index_OK.flatten()
        tensors[f"{name}.shira_weight"], tensors[f"{name}.shira_indices"] = values_N.float().cpu(), places_2N.cpu()
    config = ShiraConfig(r=r, **_shared(model, named_layers, adapter_name))
    return _write(Path(directory), config, tensors)


def export_lora(
    model: nn.Module, directory: str | Path, rank: int, adapter_name: str = "default"
) -> dict[str, float]:  # fmt: skip
    """Write the best approximation of rank ``rank`` as a PEFT LoRA adapter; it is not equivalent to the update.

    Returns:
        layer name -> share of the update's energy (squared Frobenius norm) that the approximation keeps.

    Raises:
        AdapterError: no such adapter, no connections yet, or a rank that a layer cannot have.
    """
    from peft import LoraConfig

    named_layers = _found(model, adapter_name)
    tensors, energy_shares = {}, {}
    for name, layer in named_layers:
        outputs, inputs = layer.out_features, layer.in_features
        if not 1 <= rank <= min(outputs, inputs):
            raise AdapterError(f"rank: {rank} is not between 1 and {min(outputs, inputs)}, the ranks of {name}")
        dense = layer.get_delta_weight(adapter_name)
        dense_OI = dense.mT if base_weight(layer.get_base_layer()).transposed else dense
        left_OM, singular_M, right_MI = torch.linalg.svd(dense_OI, full_matrices=False)
        root_R = singular_M[:rank].sqrt()
        tensors[f"{name}.lora_A.weight"] = (root_R[:, None] * right_MI[:rank]).float().cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = (left_OM[:, :rank] * root_R).float().cpu().contiguous()
        energy_M = singular_M.double().square()
        energy_shares[name] = float(energy_M[:rank].sum() / energy_M.sum()) if float(energy_M.sum()) > 0 else 1.0
    written_as = base_weight(named_layers[0][1].get_base_layer()).transposed
    config = LoraConfig(
        r=rank, lora_alpha=rank, fan_in_fan_out=written_as, **_shared(model, named_layers, adapter_name)
    )
    _write(Path(directory), config, tensors)
    return energy_shares


def _shira_r(layer: MoRAMLinear, adapter_name: str) -> int:
    """Return the least r that gives SHiRA as many values as the layer has connections."""
    count: int = layer.moram_index[adapter_name].numel()
    return -(-count // (layer.out_features + layer.in_features))


def _found(model: nn.Module, adapter_name: str) -> list[tuple[str, MoRAMLinear]]:
    """Return layers under their names in a PEFT file."""
    named_layers = layers(model, adapter_name)
    if not named_layers:
        raise AdapterError(f"{type(model).__name__} has no MoRAM adapter {adapter_name!r} to export")
    return [(name if name.startswith(_PREFIX) else _PREFIX + name, layer) for name, layer in named_layers]


def _shared(model: Any, named_layers: list[tuple[str, MoRAMLinear]], adapter_name: str) -> dict[str, Any]:
    """Return the options that the exported config shares with the adapter's own."""
    config = model.peft_config[adapter_name]
    return {
        "target_modules": [name.removeprefix(_PREFIX) for name, _ in named_layers],
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
    }


def _write(directory: Path, config: Any, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    save_file(tensors, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    by_umask(directory)
    return directory

"""Recovery of MoRAM adapters: factors are scattered as LoRA's are, connections get the coordinates of the full layer.

A MoRAM update is ``delta[o, i] = B[o] A[:, i]`` at K selected inputs i of every output o. In the full layer the outputs
and inputs that were pruned have zeros in B and A, so whatever connections they are given carry nothing. They need some:
every row of the full layer has the K that its width asks for. Pruned inputs fill up the rows that were kept, the first
K inputs the rows that were not.

Legend: O outputs, I inputs, R rank, K connections per output; _p of the pruned layer.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raymem.errors import RecoveryMismatch
from raymem.methods.loram.coupling import Coupling
from raymem.methods.loram.index_map import Placement, place
from raymem.methods.loram.manifest import Manifest
from raymem.methods.loram.source import Source
from raymem.storage.safetensors_io import read_header, read_tensor, save_tensors

MORAM_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.moram_(?P<part>A|B|index|base)")
"""Name of a tensor in a MoRAM file."""
_PARTS = frozenset(["A", "B", "index", "base"])

Layer = dict[str, torch.Tensor]
"""Part -> tensor of one layer in an adapter's file."""


def read_layers(file: Path) -> dict[str, Layer]:
    """Module -> its tensors in a MoRAM file.

    Raises:
        ModelError: the file cannot be read.
        RecoveryMismatch: it holds anything else.
    """
    by_name: dict[str, Layer] = {}
    for key, entry in read_header(file.parent, file.name)[1].items():
        match = MORAM_KEY.fullmatch(key)
        if match is None:
            raise RecoveryMismatch(f"{file}: {key} is no part of a MoRAM layer; train without modules_to_save")
        by_name.setdefault(match["module"], {})[match["part"]] = read_tensor(file.parent, entry)
    odd = next((module for module, layer in by_name.items() if layer.keys() != _PARTS), None)
    if odd is not None or not by_name:
        raise RecoveryMismatch(f"{file}: {odd or 'every layer'} is incomplete; give the adapter that was trained")
    return by_name


def recover_moram(
    file: Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]], coupling: Coupling, manifest: Manifest,
    full: Source,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return tensors of the full model's adapter; one full weight is in memory at a time.

    Args:
        shapes: name -> shape of the pruned model's weights.
        full: the full model, whose weights identify the base that the adapter asks for.

    Raises:
        RecoveryMismatch: the adapter belongs to another model.
    """
    tensors: dict[str, torch.Tensor] = {}
    for module, layer in sorted(read_layers(file).items()):
        shape = shapes.get(f"{module}.weight")
        if shape is None or [len(layer["B"]), layer["A"].shape[1]] != shape:
            raise RecoveryMismatch(
                f"{file}: {module} is {[len(layer['B']), layer['A'].shape[1]]} but the pruned layer "
                f"{'does not exist' if shape is None else f'is {shape}'}; it belongs to another model"
            )
        recovered = _recover_layer(layer, config, place(coupling, manifest.kept, module), module)
        recovered["base"] = base_fingerprint(full.read(f"{module}.weight"))
        tensors |= {f"base_model.model.{module}.moram_{part}": value for part, value in recovered.items()}
    return tensors


def compare_moram(
    adapter: Path, recovered: Path, configs: tuple[Mapping[str, Any], Mapping[str, Any]], coupling: Coupling,
    manifest: Manifest,
) -> int:  # fmt: skip
    """Check every tensor of a recovery; returns how many there are.

    Raises:
        RecoveryMismatch: names the layer and the part that differ.
    """
    trained, recovered_layers = read_layers(adapter), read_layers(recovered)
    if trained.keys() != recovered_layers.keys():
        odd = min(trained.keys() ^ recovered_layers.keys())
        raise RecoveryMismatch(f"{recovered}: {odd} is only in one of the adapters; recover it again")
    for module, small in trained.items():
        expected = _recover_layer(small, configs[0], place(coupling, manifest.kept, module), module)
        for part in ("A", "B", "index"):
            if recovered_layers[module][part].dtype != expected[part].dtype or not torch.equal(
                recovered_layers[module][part], expected[part]
            ):
                raise RecoveryMismatch(
                    f"{recovered}: moram_{part} of {module} is not the trained one; recover it again"
                )
    for option in ("r", "k", "density", "alpha"):
        if configs[0].get(option) != configs[1].get(option):
            raise RecoveryMismatch(f"{recovered}: its {option} is not that of {adapter}; recover it again")
    return len(_PARTS) * len(recovered_layers)


def rebased(adapter: Path, model: nn.Module, target: Path) -> Path:
    """Return a copy of a MoRAM adapter that names the weights of ``model`` as its base, to be loaded on a stand-in."""
    shutil.copytree(adapter, target)
    file = target / "adapter_model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for module, layer in read_layers(file).items():
        layer["base"] = base_fingerprint(model.get_submodule(module).weight.detach())  # type: ignore[operator]
        tensors |= {f"base_model.model.{module}.moram_{part}": value for part, value in layer.items()}
    save_tensors(file, tensors, {})
    return target


def base_fingerprint(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return the fingerprint that MoRAM records of a base weight, int64 [3]."""
    from raymem.methods.moram.base import fingerprint

    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return fingerprint(layer)


def _recover_layer(layer: Layer, config: Mapping[str, Any], placement: Placement, module: str) -> Layer:
    from raymem.methods.moram.config import connections
    from raymem.methods.moram.indices import pack_indices, unpack_indices

    rows, columns = placement.rows, placement.columns
    outputs_p, inputs_p = len(layer["B"]), layer["A"].shape[1]
    outputs, inputs = (outputs_p if rows is None else rows.size), (inputs_p if columns is None else columns.size)
    try:
        k_p = connections(config.get("k"), config.get("density"), inputs_p, module)
        k = connections(config.get("k"), config.get("density"), inputs, module)
        index_OK = unpack_indices(layer["index"], k_p, inputs_p).long()
    except ValueError as error:
        raise RecoveryMismatch(f"{module}: its connections cannot be read ({error}); fetch the adapter again") from None
    if columns is not None:
        index_OK = columns.indices_K[index_OK]
        pruned = torch.ones(inputs, dtype=torch.bool).index_fill(0, columns.indices_K, False).nonzero()[:, 0]
        filling_OK = pruned[: k - k_p].expand(outputs_p, -1)
        index_OK = torch.cat([index_OK, filling_OK], 1).sort(1).values
    assert index_OK.shape[1] == k, f"{module}: {k} connections cannot be made of {k_p}"
    if rows is not None:
        whole_OK = torch.arange(k).repeat(outputs, 1)
        index_OK = whole_OK.index_copy_(0, rows.indices_K, index_OK)
    return {
        "A": layer["A"] if columns is None else columns.put(layer["A"], 1),
        "B": layer["B"] if rows is None else rows.put(layer["B"], 0),
        "index": pack_indices(index_OK.int(), inputs),
    }

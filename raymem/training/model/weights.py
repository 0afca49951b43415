"""Loads weights lean: safetensors slices go straight into each rank's own, possibly sharded, parameters.

A model is built on the meta device first. Materialising allocates each rank's share only; then every tensor of the
checkpoint is memory-mapped, sliced to the rows this rank owns and copied. Peak host memory above the rank's share is
one tensor, never the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from raymem.account import Header, refuse_not_finite, refuse_two_places, refuse_untied, unused
from raymem.errors import ModelError
from raymem.linalg.local import local
from raymem.memory.host import host_like, keep_on_host, lives_on_host
from raymem.memory.packed import packing_of
from raymem.storage.safetensors_io import shard_files
from raymem.training.dist_env import DistEnv, local_rows

log = logging.getLogger(__name__)

NOT_FINITE = "fetch the model again, or train it again from a checkpoint without them"
"""The cure for a model with such numbers."""

TRANSPOSED = "weight_is_transposed_in_files"
"""Attribute of a 4-bit layer: whether a checkpoint holds its weight [K, N], as GPT-2's do."""

Slot = tuple[nn.Module, str]
"""The module and attribute that hold a tensor. They stay valid when adapters wrap the module or FSDP2 shards it."""


class TensorSource(Protocol):
    """Named full tensors of which row ranges can be read."""

    def names(self) -> Iterator[str]: ...

    def read(self, name: str, rows: slice | None) -> torch.Tensor: ...


class SafetensorsFiles:
    """Tensors of the safetensors files in a model directory, memory-mapped.

    Args:
        directory: as written by ``save_pretrained``: one file, or several with an index.
        rename: checkpoint key -> parameter name.

    Raises:
        ModelError: no safetensors file; or one that the index names is missing, truncated, or closed to this user.
    """

    def __init__(self, directory: Path, rename: Callable[[str], str]) -> None:
        self._where: dict[str, tuple[Path, str]] = {}
        self.entries: list[tuple[str, str, str]] = []
        """The name in the model, key and file of every tensor."""
        self.headers: dict[str, tuple[str, Header]] = {}
        """Maps each key to the name in the model, and to the file's header of the tensor."""
        for file in shard_files(directory):
            path = directory / file
            try:
                path.open("rb").close()  # safetensors calls a file missing that it may not open
                with safe_open(path, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118
                        view, name = tensors.get_slice(key), rename(key)
                        self.headers[key] = name, Header(view.get_dtype(), tuple(view.get_shape()))
                        self._where[name] = (path, key)
                        self.entries.append((name, key, file))
            except PermissionError:
                raise ModelError(f"{path}: permission denied; let this user read it") from None
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: not a complete safetensors file ({error}); fetch it again") from None

    def leave_out(self, keys: Iterable[str]) -> None:
        """Forget tensors, by their keys in the files."""
        for key in keys:
            self._where.pop(self.headers[key][0], None)

    def names(self) -> Iterator[str]:
        return iter(self._where)

    def read(self, name: str, rows: slice | None) -> torch.Tensor:
        path, key = self._where[name]
        # Opened per tensor: a mapping that is kept open counts every page it ever touched as resident.
        with safe_open(path, framework="pt") as tensors:
            view = tensors.get_slice(key)
            value: torch.Tensor = view[rows] if rows is not None else tensors.get_tensor(key)
            return value


class StateDictSource:
    """A complete state dict, for models that start from random weights or whose checkpoints need conversion."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def names(self) -> Iterator[str]:
        return iter(self._state)

    def read(self, name: str, rows: slice | None) -> torch.Tensor:
        value = self._state[name]
        return value if rows is None else value[rows]


def checkpoint_source(model: Any, directory: Path) -> TensorSource:
    """Open the tensors of ``directory`` under the names of ``model`` (a plain transformers model on the meta device).

    transformers renames keys of old checkpoints and, for some families, fuses tensors while loading. Renames are
    followed here; a checkpoint that needs arithmetic is loaded whole by transformers itself, and that is said.

    Raises:
        ModelError: not a complete checkpoint, or one with a tensor that is neither loaded nor known to be of no use.
    """
    files, converted = _open(model, directory)
    if not converted:
        return files
    log.warning(
        "%s needs conversion on loading (%s and %d more): every worker loads the whole model once",
        directory,
        converted[0],
        len(converted) - 1,
    )
    loaded, report = type(model).from_pretrained(
        directory,
        dtype=model.dtype,
        local_files_only=True,
        output_loading_info=True,
        trust_remote_code=False,
    )
    if report["missing_keys"]:  # transformers would make them up
        raise ModelError(_missing(set(report["missing_keys"])))
    return StateDictSource(loaded.state_dict())


def _open(model: Any, directory: Path) -> tuple[SafetensorsFiles, list[str]]:
    """Return the files, with every tensor accounted for, and the keys whose tensors must be converted while loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    meta_state = model.state_dict()
    converted: dict[str, None] = {}

    def rename(key: str) -> str:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta_state)
        if pattern is not None:
            converted[key] = None
        return str(name)

    files = SafetensorsFiles(directory, rename)
    useless = unused(model, directory, files.headers)
    for key, reason in useless.items():
        log.debug("%s: tensor %s is left out: %s", directory, key, reason)
    refuse_two_places(directory, ((key if key in converted else name, key, file) for name, key, file in files.entries))
    files.leave_out(useless)
    refuse_untied(model, directory, files.names(), lambda name: files.read(name, None), model.dtype)
    return files, list(converted)


def check_checkpoint(model: Any, directory: Path) -> dict[str, str | None]:
    """Refuse a model directory that training would refuse for its tensors; headers are read, and tied tensors.

    Args:
        model: bare transformers model on the meta device, of that directory's config.

    Returns:
        Key in the files -> name in the model, or None where it is converted while loading; without what is of no use.

    Raises:
        ModelError: see :func:`checkpoint_source`.
    """
    files, converted = _open(model, directory)
    used = set(files.names())
    names = {key: None if key in converted else name for key, (name, _) in files.headers.items() if name in used}
    if converted:  # what becomes of these, transformers says when it loads them
        return names
    shapes = {name: header.shape for name, header in files.headers.values()}
    places = model.state_dict()
    if missing := _without_value(set(places), places.keys() & shapes.keys(), tied_names(model)):
        raise ModelError(_missing(missing))
    for name in places.keys() & shapes.keys():
        _same_shape(name, places[name], torch.empty(shapes[name], device="meta"))
    return names


def slots(model: nn.Module) -> dict[str, Slot]:
    """Map each parameter and persistent buffer to its slot; tied parameters appear under each of their names."""
    slots_by_name: dict[str, Slot] = {}
    for prefix, module in model.named_modules():
        for name in [*module._parameters, *module._buffers]:
            if getattr(module, name) is not None and name not in module._non_persistent_buffers_set:
                slots_by_name[f"{prefix}.{name}" if prefix else name] = (module, name)
    return slots_by_name


def materialise(model: nn.Module, dist_env: DistEnv) -> None:
    """Allocate what is still on the meta device, uninitialised, keeping tied parameters tied."""
    if dist_env.sharded:
        firsts: dict[int, Slot] = {}
        ties = [(slot, firsts.setdefault(id(parameter), slot)) for slot, parameter in _parameter_slots(model)]
        model.to_empty(device=dist_env.device)  # makes a parameter for every place; FSDP2 knows that in the first one
        for (module, name), (owner, first) in ties:
            module._parameters[name] = owner._parameters[first]
        return
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in fresh:
                    fresh[id(parameter)] = _empty_parameter(parameter, dist_env.device)
                module._parameters[name] = fresh[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=dist_env.device)


def _parameter_slots(model: nn.Module) -> Iterator[tuple[Slot, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (module, name), parameter


def _empty_parameter(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if type(parameter) is not nn.Parameter:
        return parameter  # a quantised weight allocates itself when its value arrives
    if lives_on_host(parameter):
        return keep_on_host(nn.Parameter(host_like(parameter, device)))
    return nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)


@torch.no_grad()
def fill(places: Mapping[str, Slot], source: TensorSource, dist_env: DistEnv, tied: Mapping[str, str]) -> None:
    """Copy every tensor of ``source`` into its slot.

    Args:
        places: name -> slot of the bare model.
        tied: name -> another name of the same tensor; one of the two may be missing from the source.

    Raises:
        ModelError: a tensor is missing or has another shape.
    """
    held: set[str] = set()
    for name in source.names():
        if name not in places:
            continue  # of a complete state dict: what another class of the same family has
        module, attribute = places[name]
        target = getattr(module, attribute)
        if target is None:
            continue
        put(module, attribute, lambda rows, name=name: source.read(name, rows), dist_env, name)  # type: ignore[misc]
        held.add(name)
    if missing := _without_value(set(places), held, tied):
        raise ModelError(_missing(missing))


def tied_names(model: Any) -> dict[str, str]:
    """Name -> another name of the same tensor, of a bare transformers model."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _without_value(names: set[str], held: set[str], tied: Mapping[str, str]) -> set[str]:
    """Return names of tensors that are held under no name."""
    held = held | {origin for target, origin in tied.items() if target in held}
    return names - held - {target for target, origin in tied.items() if origin in held}


def _missing(names: set[str]) -> str:
    return (
        f"model.name: {len(names)} tensors are missing from the checkpoint, the first is {min(names)}; "
        "it was made for another architecture or is incomplete"
    )


@torch.no_grad()
def put(
    module: nn.Module, attribute: str, read: Callable[[slice | None], torch.Tensor], dist_env: DistEnv, name: str
) -> None:
    """Write one tensor into its slot: whole, as this rank's rows, quantised, or this rank's share of that.

    Raises:
        ModelError: the shapes differ, or a number of a parameter is nan or infinite.
    """
    target = getattr(module, attribute)
    if isinstance(target, nn.Parameter):  # a buffer may be a mask
        given, read = read, lambda rows: refuse_not_finite(given(rows), f"model.name: tensor {name}", NOT_FINITE)
    if (packing := packing_of(module, attribute)) is not None:
        value = _as_multiplied(module, read(None))
        _same_shape(name, torch.empty(packing.shape, device="meta"), value)
        flat = packing.pack(value, dist_env.device)  # the whole weight, for its scales have a scale in common
        if isinstance(target, DTensor):
            flat = flat[local_rows(len(flat), dist_env.rank, dist_env.world_size)]
        local(target).copy_(flat)
    elif isinstance(target, DTensor):
        rows = local_rows(target.shape[0], dist_env.rank, dist_env.world_size) if target.dim() else None
        share, value = target.to_local(), read(rows)
        _same_shape(name, share, value)
        share.copy_(value)
    elif type(target) is not nn.Parameter and isinstance(target, nn.Parameter):
        value = _as_multiplied(module, read(None))
        _same_shape(name, target, value)
        _quantise(module, attribute, value, dist_env)
    else:
        value = read(None)
        _same_shape(name, target, value)
        target.copy_(value)


def _as_multiplied(module: nn.Module, value: torch.Tensor) -> torch.Tensor:
    """Return a weight [N, K], the way round that a 4-bit layer multiplies by it."""
    return value.mT.contiguous() if getattr(module, TRANSPOSED, False) else value


def _same_shape(name: str, target: torch.Tensor, value: torch.Tensor) -> None:
    if target.shape != value.shape:
        raise ModelError(
            f"model.name: tensor {name} has shape {list(value.shape)} in the checkpoint but {list(target.shape)} in "
            "the architecture that config.json describes; config and weights do not belong together"
        )


def _quantise(module: nn.Module, attribute: str, value: torch.Tensor, dist_env: DistEnv) -> None:
    """Replace a bitsandbytes placeholder by the packed 4-bit form of ``value``."""
    import bitsandbytes as bnb

    old: Any = getattr(module, attribute)
    packed = bnb.nn.Params4bit(
        value.contiguous(),
        requires_grad=False,
        quant_type=old.quant_type,
        compress_statistics=old.compress_statistics,
        blocksize=old.blocksize,
        module=module,
    )
    setattr(module, attribute, packed.to(dist_env.device))

"""Adapters: attaching, initial values, what is stored, and continuing. Both LoRA and MoRAM are methods of PEFT."""

from __future__ import annotations

import difflib
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from raymem.errors import AdapterError, ModelError, RecipeError
from raymem.methods.loram.config import LoRAMOptions
from raymem.methods.moram.config import MoRAMOptions
from raymem.recipe.schema import LoraAdapter, NoAdapter, Recipe
from raymem.seeds import generator
from raymem.training.model.base_name import base_name
from raymem.training.model.linear_layers import freeze_unused
from raymem.training.model.peft_import import without_bitsandbytes
from raymem.training.model.sentences import as_sentence
from raymem.training.model.targets import choose

log = logging.getLogger(__name__)


def attach(model: Any, recipe: Recipe, dtype: torch.dtype) -> Any:
    """Wrap a model (usually on the meta device) with the recipe's adapter; the base is frozen.

    Without an adapter everything is trained but what ``adapter.freeze`` names.

    Args:
        dtype: of the adapter's weights. PEFT would use fp32 and save an fp32 copy of every layer input.

    Raises:
        RecipeError: a target pattern that matches nothing, or an option that a layer cannot have.
    """
    adapter = recipe.adapter
    if isinstance(adapter, NoAdapter):
        _freeze(model, adapter.freeze)
        freeze_unused(model)
        return model
    with without_bitsandbytes():
        from peft import get_peft_model

        config = _peft_config(model, adapter)
        planned = isinstance(recipe.base, LoRAMOptions) and recipe.base.artifact is None
        try:
            with as_sentence(
                RecipeError, f"adapter: PEFT refuses it for {type(model).__name__}", "change adapter.targets"
            ):
                wrapped = get_peft_model(model, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        except AdapterError as error:
            raise RecipeError(f"adapter.{error}") from None
        # Only now: PEFT puts the directory there from which the config was read, which for a hub id is a cache.
        config.base_model_name_or_path, config.revision = (None, None) if planned else base_name(recipe)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped


def _freeze(model: nn.Module, names: list[str]) -> None:
    modules = dict(model.named_modules())
    for name in names:
        found = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not found:
            near = difflib.get_close_matches(name, sorted({path.rpartition(".")[2] for path in modules}), n=3)
            raise RecipeError(
                f"adapter.freeze: {name!r} is no module of {type(model).__name__}"
                f"{'; near names: ' + ', '.join(near) if near else ''}"
            )
        for path in found:
            modules[path].requires_grad_(False)


def _peft_config(model: nn.Module, adapter: LoraAdapter | MoRAMOptions) -> Any:
    """The recipe's adapter in PEFT's terms."""
    targets = choose(model, adapter.targets)
    if isinstance(adapter, LoraAdapter):
        from peft import LoraConfig

        return LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=targets.modules,
            target_parameters=targets.parameters or None,
            task_type="CAUSAL_LM",
        )
    from raymem.methods.moram import MoRAMConfig

    if targets.parameters:
        raise RecipeError(
            f"adapter.targets: {targets.parameters[0]} holds routed experts, and MoRAM adapts linear layers; leave it "
            "out or use adapter: lora"
        )
    return MoRAMConfig(
        r=adapter.rank,
        k=adapter.k,
        density=adapter.density,
        alpha=adapter.alpha,
        formulation=adapter.formulation,
        target_modules=targets.modules,
        task_type="CAUSAL_LM",
    )


def stored_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the adapter: a checkpoint and the exported adapter hold them beside what is trained."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            own = {f"{prefix}.{name}": buffer for name, buffer in layer.named_buffers()}
            found.update({name: b for name, b in own.items() if not name.startswith(f"{prefix}.base_layer.")})
    return found


def initial_value(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """fp32 start of one matrix of an adapter, the same on every rank and in every layout.

    PEFT's own distributions: A uniform in +-1/sqrt(fan_in) (Kaiming with a = sqrt(5)), B zero; embedding A zero.
    """
    if ".lora_A." in name or ".moram_A." in name:
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, "adapter", name))
    if ".lora_B." in name or ".moram_B." in name or ".lora_embedding_A." in name:
        return torch.zeros(shape)
    if ".lora_embedding_B." in name:
        return torch.empty(shape).normal_(generator=generator(seed, "adapter", name))
    raise AssertionError(f"no initial value is known for adapter tensor {name}")


MEANING = {
    "LORA": ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias"),
    "MORAM": ("r", "k", "density", "alpha"),
}
"""Options of a PEFT adapter that decide what its tensors mean."""

_RECIPE_KEYS = {"r": "rank", "lora_alpha": "alpha", "alpha": "alpha", "k": "k", "density": "density"}


def read_config(directory: str | Path) -> dict[str, Any]:
    """The adapter_config.json of a PEFT LoRA or MoRAM.

    Raises:
        ModelError: there is none, or it is another kind of adapter.
    """
    path = Path(directory) / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"adapter.init_from: {path} cannot be read ({error}); give a PEFT directory") from None
    if config.get("peft_type") not in MEANING:
        raise ModelError(
            f"adapter.init_from: {path} is a {config.get('peft_type')} adapter, and only {' and '.join(MEANING)} are "
            f"continued; {_merged_instead(directory)}"
        )
    return config


@torch.no_grad()
def _without_base(saved: dict[str, torch.Tensor], model: nn.Module, directory: str) -> dict[str, torch.Tensor]:
    """The adapter's own tensors: PEFT saves the base's weights too where it adapts an embedding or an output head.

    Raises:
        ModelError: they are not those of the base in ``model``, so that without them the adapter is another function.
    """
    of_base = [key for key in saved if ".base_layer." in key and _has(model, key)]  # else the targets differ
    for key in of_base:
        held: Any = model.get_parameter(key)
        held = held.full_tensor() if isinstance(held, DTensor) else held
        value = saved[key]
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if value.shape != held.shape:
            raise ModelError(
                f"adapter.init_from: {directory} holds {name} of the base as {list(value.shape)} but this base has "
                f"{list(held.shape)}; give the base that it was trained on as model.name, or resize this one with "
                "transformers (resize_token_embeddings), merge the adapter into it with PEFT (merge_and_unload), save "
                "that as model.name, and train without init_from"
            )
        if not torch.equal(value.to(held), held):
            raise ModelError(
                f"adapter.init_from: {directory} holds {name} of the base with other values than this base; "
                + _merged_instead(directory)
            )
    return {key: tensor for key, tensor in saved.items() if key not in of_base}


def _merged_instead(directory: str | Path) -> str:
    """The cure that works for every adapter that PEFT can merge."""
    return f"merge it (raymem merge {directory} -o MERGED), give MERGED as model.name and train without init_from"


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def read_adapter(directory: str, model: Any) -> dict[str, torch.Tensor]:
    """Tensors of a PEFT directory under the names of a wrapped model whose base is filled. Collective if it is sharded.

    Raises:
        ModelError: no such directory, or an adapter of other targets, another rank, alpha or variant.
    """
    config = read_config(directory)
    ours: dict[str, Any] = model.peft_config["default"].to_dict()
    if config["peft_type"] != ours["peft_type"]:
        kinds = {"LORA": "lora", "MORAM": "moram"}
        raise ModelError(
            f"adapter.init_from: {directory} is a {config['peft_type']} adapter; set adapter.kind: "
            f"{kinds[config['peft_type']]}"
        )
    for option in MEANING[config["peft_type"]]:
        theirs, wanted = config.get(option) or None, ours.get(option) or None
        if theirs != wanted:
            key = _RECIPE_KEYS.get(option)
            cure = f"set adapter.{key}: {theirs}" if key else _merged_instead(directory)
            raise ModelError(
                f"adapter.init_from: {directory} was trained with {option}={theirs} but this recipe has {wanted}, "
                f"which would change what it does; {cure}"
            )
    path = Path(directory) / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(f"adapter.init_from: {directory} holds no adapter_model.safetensors; give a PEFT directory")
    try:
        with safe_open(path, framework="pt") as file:
            saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"adapter.init_from: {path}: not a complete safetensors file ({error})") from None
    saved = _without_base(saved, model, directory)
    expected = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    expected |= {name: buffer.shape for name, buffer in stored_buffers(model).items()}
    by_file_name = {name.removesuffix(".default").replace(".default.", "."): name for name in expected}
    if set(by_file_name) != set(saved):
        odd = sorted(set(by_file_name) ^ set(saved))[0]
        raise ModelError(
            f"adapter.init_from: {path} was trained on other layers than adapter.targets selects "
            f"(first difference: {odd}); use the same targets, or {_merged_instead(directory)}"
        )
    if config["peft_type"] == "MORAM":
        from raymem.methods.moram import model_state

        try:
            return model_state(model, saved)
        except AdapterError as error:
            raise ModelError(f"adapter.init_from: {path}: {error}") from None
    for key, tensor in saved.items():
        if tensor.shape != expected[by_file_name[key]]:
            raise ModelError(
                f"adapter.init_from: {key} is {list(tensor.shape)} in {path} but this recipe makes it "
                f"{list(expected[by_file_name[key]])}; set adapter.rank to the rank of that adapter"
            )
    return {by_file_name[key]: tensor for key, tensor in saved.items()}

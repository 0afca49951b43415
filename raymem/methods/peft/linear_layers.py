"""Finds the linear layers of an architecture that take an adapter, by a small clone with as many layers as the model.

One forward and backward pass over text shows what is called, with what, and what gets a gradient. PEFT is asked whether
it takes a layer of that name. ``all-linear`` is every layer of which nothing speaks against it.

Routed experts of transformers 5 are no linear layers but parameters with three dimensions. PEFT reaches them through
``target_parameters``, in some architectures under the names of shared experts, with ranks of its own, without dropout,
and holds a whole copy of every expert for backward. So they are left alone in every architecture, unless
``adapter.targets`` names them.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D  # how GPT-2 writes its linear layers

from raymem.memory.packed import packing_of
from raymem.methods.peft.importing import without_bitsandbytes
from raymem.methods.probe import asked_once, class_of, first_line, why_not
from raymem.methods.tiny_model import VOCABULARY, random_clone
from raymem.seeds import generator

UNUSED = "text does not pass through it"
"""The reason to leave a layer alone that a step on text would not give a gradient."""
_ROWS, _LENGTH = 2, 24
_EXPERT_DIMENSIONS = 3


@dataclass(frozen=True)
class TextPass:
    """The observations of one forward and backward pass over text, for an architecture."""

    left_alone: Mapping[str, str]
    """Maps each linear layer without an adapter to the reason. Names, or patterns of names with ``*`` for numbers."""
    without_gradient: frozenset[str]
    """Parameters, by name or pattern, that text does not pass through."""
    reason: str | None
    """The reason why nothing is known, if so."""

    def why_left_alone(self, name: str) -> str | None:
        """Say why a linear layer of the model takes no adapter; None if it does."""
        return self.left_alone.get(name, self.left_alone.get(pattern_of(name)))

    def is_without_gradient(self, name: str) -> bool:
        return name in self.without_gradient or pattern_of(name) in self.without_gradient


def text_pass(model: Any) -> TextPass:
    """Find the layers that text passes through in a model; done once per architecture, options and versions."""
    answer = asked_once("text pass", model, (Path(__file__),), lambda: _ask(model.config, class_of(model)))
    return TextPass(answer["left_alone"], frozenset(answer["without_gradient"]), answer["reason"])


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer by name, of 4 bits too, but the output head."""
    head = output_head(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name: module for name, module in layers.items() if module is not head}


def output_head(model: Any) -> nn.Module | None:
    """Return the layer that gives the logits, if transformers knows it."""
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head


def adaptable(model: Any) -> list[str]:
    """List the names of the layers that ``all-linear`` stands for."""
    verdict = text_pass(model)
    return [name for name in linear_layers(model) if verdict.why_left_alone(name) is None]


def routed_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hold the weights of all experts of a layer, by name."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        for name, parameter in experts_of_a_layer(module).items()
    }


def experts_of_a_layer(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of one module that hold the weights of all experts, in 4 bits or not, by name."""
    if "expert" not in type(module).__name__.lower():
        return {}
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and (parameter.dim() == _EXPERT_DIMENSIONS or packing_of(module, name) is not None)
    }


def freeze_unused(model: Any) -> None:
    """Freeze the layers that text does not pass through: DDP would wait for their gradients."""
    verdict = text_pass(model)
    for name, parameter in model.named_parameters():
        if verdict.is_without_gradient(name):
            parameter.requires_grad_(False)


def pattern_of(name: str) -> str:
    """Replace the numbers of layers and experts in a name by ``*``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _ask(config: Any, kind: Any) -> dict[str, Any]:
    try:
        model = random_clone(config, kind=kind, all_layers=True)
        left_alone, without_gradient = _try(model, random_clone(config, kind=kind))
    except Exception as error:  # model code may raise anything
        return {"left_alone": {}, "without_gradient": [], "reason": why_not(error)}
    layers, parameters = linear_layers(model), [name for name, _ in model.named_parameters()]
    unused = _shortened(dict.fromkeys(without_gradient, ""), parameters)
    return {"left_alone": _shortened(left_alone, list(layers)), "without_gradient": sorted(unused), "reason": None}


def _try(model: Any, few_layers: Any) -> tuple[dict[str, str], list[str]]:
    """Find layers with the reason why they take no adapter, and parameters without a gradient.

    Args:
        few_layers: a smaller clone, for what hangs on names alone.
    """
    layers = linear_layers(model)
    calls: dict[str, str | None] = {}
    """Maps each layer that is called to the oddity of its calls."""

    def watching(name: str) -> Any:
        def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = calls.get(name) or _odd(module, args, kwargs, output)

        return watch

    handles = [module.register_forward_hook(watching(name), with_kwargs=True) for name, module in layers.items()]
    ids = torch.randint(3, VOCABULARY, (_ROWS, _LENGTH), generator=generator(0, "text pass"))
    logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()  # type: ignore[no-untyped-call]
    refused = _refused_by_peft(few_layers, [name for name in linear_layers(few_layers) if name in calls])
    left_alone: dict[str, str] = {}
    for name in layers:
        if name not in calls:
            is_read = layers[name].weight.grad is not None
            left_alone[name] = "its weight is read past the layer" if is_read else UNUSED
        elif (reason := calls[name] or _weight_is_read(model, name) or refused.get(_leaf(name))) is not None:
            left_alone[name] = reason
    return left_alone, [name for name, parameter in model.named_parameters() if parameter.grad is None]


def _odd(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> str | None:
    """Say how a call of a linear layer differs from a product."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        return "it is not given one tensor"
    if not isinstance(output, torch.Tensor):
        return f"it gives a {type(output).__name__}, no tensor"
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    with torch.no_grad():
        product = F.linear(args[0], weight, module.bias)
    is_plain = product.shape == output.shape and torch.allclose(product, output, rtol=1e-4, atol=1e-4)
    return None if is_plain else f"{type(module).__name__} does more than multiply by its weight"


def _weight_is_read(model: nn.Module, name: str) -> str | None:
    """Say whether the code around a layer reads its weight, as for fused kernels, past whatever wraps the layer."""
    around: Any = type(model.get_submodule(name.rpartition(".")[0]))
    leaf = _leaf(name)
    try:
        source = _source(around)
    except (OSError, TypeError):
        return None
    reads = rf"self\.{re.escape(leaf)}\.(weight|bias)\b(?!\[|\.(dtype|device|shape|size|data))"
    return f"{around.__name__} reads its weight past the layer" if re.search(reads, source) else None


_source: Callable[[Any], str] = functools.cache(inspect.getsource)


def _refused_by_peft(model: Any, names: list[str]) -> dict[str, str]:
    """Map the last part of a name to the reason why PEFT does not put LoRA there, or puts it elsewhere."""
    with without_bitsandbytes():
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

    refused: dict[str, str] = {}
    for name in {_leaf(name): name for name in names}.values():
        options = LoraConfig(r=1, target_modules=[name], task_type="CAUSAL_LM")
        try:
            tuner = LoraModel(model, options, "default", low_cpu_mem_usage=True)
        except Exception as error:  # PEFT raises types of many kinds
            if "fused" not in str(error):
                refused[_leaf(name)] = f"PEFT refuses it: {first_line(error)}"
                continue
            refused[_leaf(name)] = _NAME_OF_EXPERTS
            continue
        if tuner.targeted_module_names != [name]:
            refused[_leaf(name)] = _NAME_OF_EXPERTS
        tuner.unload()
    return refused


_NAME_OF_EXPERTS = "PEFT takes the name for one of routed experts"


def _shortened(facts: dict[str, str], names: list[str]) -> dict[str, str]:
    """Replace names by patterns where all that match one say the same."""
    by_pattern: dict[str, set[str | None]] = {}
    for name in names:
        by_pattern.setdefault(pattern_of(name), set()).add(facts.get(name))
    return {
        (pattern_of(name) if len(by_pattern[pattern_of(name)]) == 1 else name): fact for name, fact in facts.items()
    }


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]

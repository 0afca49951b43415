"""Summarises what a recipe does to the weights of its model: adapted, trained, quantised, left alone, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from raymem.memory.nf4 import is_4bit
from raymem.methods.peft.linear_layers import UNUSED, linear_layers, pattern_of, routed_experts, text_pass
from raymem.recipe.schema import Recipe

_MOST_NAMES = 8


@dataclass(frozen=True)
class Line:
    """A line about modules that are treated alike."""

    what: str
    """The treatment of the modules."""
    names: tuple[str, ...]
    """The ends of their names, each once."""
    count: int
    """The number of modules, or of parameters where a parameter stands alone."""
    why: str | None = None

    def __str__(self) -> str:
        names = ", ".join(self.names[:_MOST_NAMES]) + (", ..." if len(self.names) > _MOST_NAMES else "")
        return f"{self.what} ({self.count}): {names}" + (f" - {self.why}" if self.why else "")


def what_is_trained(model: Any, recipe: Recipe) -> list[Line]:
    """Say which modules of a model are adapted, trained, quantised and left alone.

    Args:
        model: as :func:`raymem.training.model.build.build_model` gives it, on any device.
    """
    base_model = model.get_base_model() if hasattr(model, "peft_config") else model
    lines = _adapted(base_model, recipe) if recipe.trains_adapter else _trained(base_model, recipe)
    return lines + (_quantised(base_model) if recipe.base.quantize == "nf4" else [])


def _trained(model: Any, recipe: Recipe) -> list[Line]:
    """Return the lines of full fine-tuning."""
    verdict = text_pass(model)
    parameters = dict(model.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    unused = [name for name in parameters if verdict.is_without_gradient(name)]
    named = [name for name, p in parameters.items() if not p.requires_grad and name not in set(unused)]
    return [
        Line("trained", ("all weights" if not unused and not named else "all other weights",), len(trained)),
        *_unused("frozen", unused, list(parameters)),
        *_lines("frozen", dict.fromkeys(named, _setting(recipe, "freeze")), depth=2),
    ]


def _adapted(model: Any, recipe: Recipe) -> list[Line]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not wrapped:  # an adapter that PEFT does not know
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return list(_lines(f"trained ({recipe.adapter.kind})", dict.fromkeys(trained, ""), depth=2))
    verdict = text_pass(model)
    # Layers lie one deeper where PEFT wraps them; experts have one wrapper in the other for every parameter.
    layers = {name.removesuffix(".base_layer"): name for name in linear_layers(model) if ".lora_" not in name}
    adapted = {name: "" for name in layers if name in wrapped}
    head = model.get_output_embeddings()
    adapted |= {name: "" for name, module in wrapped.items() if module is head}
    experts: dict[str, str] = {}
    touched: dict[str, str] = {}
    for name in routed_experts(model):
        owner, _, leaf = name.rpartition(".")
        plain = owner.replace(".base_layer", "") + f".{leaf}"
        is_adapted = any(getattr(module, "parameter_name", None) == leaf and owner.startswith(outer)
                         for outer, module in wrapped.items())  # fmt: skip
        if is_adapted:
            touched[plain] = ""
        else:
            experts[plain] = "routed experts are no linear layers; adapter.targets may name them"
    alone = {
        name: verdict.why_left_alone(name) or _setting(recipe, "targets") for name in layers if name not in adapted
    }
    unused = [name for name, reason in alone.items() if reason == UNUSED]
    alone = {name: reason for name, reason in alone.items() if reason != UNUSED}
    return [
        *_lines(f"adapted ({recipe.adapter.kind})", adapted | touched),
        *_unused("left alone", unused, list(layers)),
        *_lines("left alone", alone, depth=2),
        *_lines("left alone", experts, depth=2),
    ]


def _setting(recipe: Recipe, option: str) -> str:
    """Return the setting that leaves modules out: an option of the adapter, if its kind has that one."""
    return f"adapter.{option}" if hasattr(recipe.adapter, option) else f"adapter.kind: {recipe.adapter.kind}"


def _quantised(model: Any) -> list[Line]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    packed, whole = {}, {}
    for name, module in layers.items():
        plain = name.removesuffix(".base_layer")
        if is_4bit(module):
            packed[plain] = ""
        elif not any(part in name for part in (".lora_", ".moram_")):
            whole[plain] = "transformers keeps the output head and what is tied to it"
    experts = {name.replace(".base_layer", ""): "" for name in routed_experts(model)}
    return [
        *_lines("in 4 bits", packed),
        *_lines("in 4 bits", experts, depth=2),
        *_lines("not in 4 bits", whole, depth=2),
    ]


def _lines(what: str, reasons: dict[str, str], depth: int = 1) -> Iterable[Line]:
    """Yield one line for every reason.

    Args:
        reasons: name -> why.
        depth: parts of a name that are said.
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        ends = dict.fromkeys(".".join(pattern_of(name).split(".")[-depth:]) for name in names)
        yield Line(what, tuple(ends), len(names), reason or None)


def _unused(what: str, unused: list[str], names: list[str]) -> list[Line]:
    """Return a line that names the largest parts of the model of which nothing is used.

    Args:
        names: of everything of this sort, used or not.
    """
    used = {prefix for name in set(names) - set(unused) for prefix in _prefixes(name)}
    roots = dict.fromkeys(
        pattern_of(next(prefix for prefix in [*_prefixes(name), name] if prefix not in used)) for name in unused
    )
    return [Line(what, tuple(roots), len(unused), UNUSED)] if unused else []


def _prefixes(name: str) -> list[str]:
    """List the modules that a name lies in, from the outermost."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]

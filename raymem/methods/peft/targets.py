"""Translates ``adapter.targets`` into layers and experts of a model, in PEFT's terms."""

from __future__ import annotations

import difflib
import logging
import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from raymem.errors import RecipeError
from raymem.methods.peft.linear_layers import adaptable, linear_layers, output_head, routed_experts, text_pass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """The targets that PEFT is told to adapt."""

    modules: str | list[str]
    """The names of linear layers, whole or their ends after a dot, or one expression for whole names."""
    parameters: list[str] = field(default_factory=list)
    """The names of parameters that hold routed experts."""


def choose(model: Any, targets: str | list[str]) -> Targets:
    """Translate the targets of a recipe into PEFT's terms.

    PEFT takes expressions only alone and complains only when nothing matches at all; here every pattern must match, and
    what an adapter would do nothing for, or PEFT would put elsewhere, is left out.

    Args:
        model: bare transformers model, on any device.
        targets: ``all-linear``, names, or regular expressions for whole names.

    Raises:
        RecipeError: a pattern that matches nothing, or nothing that takes an adapter.
    """
    verdict = text_pass(model)
    if targets == "all-linear":
        if verdict.reason is not None:
            log.warning("adapter.targets: all-linear is every linear layer, for %s", verdict.reason)
        names = adaptable(model)
        if not names:
            why = ", ".join(dict.fromkeys(verdict.left_alone.values())) or "it has no linear layer but its output head"
            raise RecipeError(
                f"adapter.targets: all-linear finds no layer of {type(model).__name__} that takes an adapter ({why}); "
                "name layers, or train with adapter: none"
            )
        return Targets(names)
    patterns = [targets] if isinstance(targets, str) else targets
    layers, experts = _all_linear_layers(model), list(routed_experts(model))
    expressions: list[str] = []
    chosen: dict[str, None] = {}
    parameters: dict[str, None] = {}
    is_whole = True
    for pattern in patterns:
        expression = _expression(pattern, layers + experts)
        matched = [name for name in layers if re.fullmatch(expression, name)]
        expert_names = [name for name in experts if re.fullmatch(expression, name)]
        if not matched and not expert_names:
            raise RecipeError(_no_match(model, pattern, layers + experts))
        reasons = {name: verdict.why_left_alone(name) for name in matched}
        taken = [name for name, reason in reasons.items() if reason is None]
        if not taken and not expert_names:
            name, reason = next(iter(reasons.items()))
            raise RecipeError(
                f"adapter.targets: {pattern!r} matches only layers of {type(model).__name__} that take no adapter, "
                f"such as {name}: {reason}; leave it out"
            )
        is_whole = is_whole and len(taken) == len(matched)
        chosen |= dict.fromkeys(taken)
        parameters |= dict.fromkeys(expert_names)
        if matched:
            expressions.append(expression)
    if not is_whole or parameters:
        return Targets(list(chosen), list(parameters))
    if all(_is_end(expression) for expression in expressions):
        return Targets(patterns)
    return Targets("|".join(expressions))


_END = r"(?:.*\.)?"


def _is_end(expression: str) -> bool:
    return expression.startswith(_END)


def _all_linear_layers(model: Any) -> list[str]:
    """Return every linear layer, the output head among them."""
    layers = set(linear_layers(model))
    head = output_head(model)
    return [name for name, module in model.named_modules() if name in layers or (name and module is head)]


def _expression(pattern: str, names: list[str]) -> str:
    """Compile a regular expression for whole names."""
    if any(name == pattern or name.endswith(f".{pattern}") for name in names):
        return f"{_END}{re.escape(pattern)}"
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"adapter.targets: {pattern!r} is not a valid pattern: {error}") from None
    return f"(?:{pattern})"


def _no_match(model: nn.Module, pattern: str, names: list[str]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(pattern, leaves, n=3, cutoff=0.3) or leaves
    return (
        f"adapter.targets: {pattern!r} matches no linear layer of {type(model).__name__}; near names: {', '.join(near)}"
    )

"""How much a pruning keeps and saves: exact arithmetic from a config alone.

Counts follow the paper's released arithmetic (LoRAM, arXiv 2502.13533, tables 1, 4 and 5), in fractions instead of
floats: ``int(8 * (1 - 0.9))`` is 0 and ``int(40 * (1 - 0.9))`` is 3 in floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from raymem.errors import RecipeError
from raymem.memory import nf4
from raymem.methods.loram.config import PruneOptions
from raymem.methods.loram.coupling import Coupling, Group, couple
from raymem.methods.loram.nonuniform import Counts, meta_model


@dataclass(frozen=True)
class Size:
    """Parameters and stored bytes of one model."""

    parameters: int
    linear_parameters: int
    """Those of the linear layers inside decoder layers (and OPT's projections), which NF4 quantises."""
    nf4_bytes: int
    """With linear layers in NF4 and double quantisation and all else (embeddings, output head, norms, biases) in bf16:
    what bitsandbytes really stores, but for a table of 1 KiB per linear layer."""

    @property
    def bf16_bytes(self) -> int:
        return 2 * self.parameters


@dataclass(frozen=True)
class Plan:
    """How many units every pruned layer keeps, and what the model then weighs."""

    coupling: Coupling
    options: PruneOptions
    counts: Counts
    """Layer -> group -> kept units of the layers that get smaller; empty for the structures that only write zeros."""
    full: Size
    pruned: Size
    """Equals ``full`` for the structures that only write zeros: dense zeros save no memory."""
    theoretical_parameters: int
    """Weights that are not zero by design: of ``units`` all that are left, else what the paper counts."""

    @property
    def pruned_layers(self) -> list[int]:
        """The layers from which something goes."""
        layers = range(self.coupling.num_layers)
        return [layer for layer in layers if self.options.ratio_of(layer, len(layers)) > 0]

    @property
    def paper_reduction(self) -> float:
        """Full over remaining parameters, as in the paper's tables."""
        return self.full.parameters / self.theoretical_parameters

    @property
    def paper_nf4_reduction(self) -> float:
        """The same with every remaining parameter counted at 4 of 16 bits."""
        return 4 * self.paper_reduction

    @property
    def bf16_reduction(self) -> float:
        """Bytes of the full model in bf16 over those of the pruned model in bf16."""
        return self.full.bf16_bytes / self.pruned.bf16_bytes

    @property
    def nf4_reduction(self) -> float:
        """Bytes of the full model in bf16 over those that the pruned model occupies in NF4."""
        return self.full.bf16_bytes / self.pruned.nf4_bytes

    @property
    def saves_memory(self) -> bool:
        return self.options.structure == "units"


def plan_pruning(config: Any, options: PruneOptions) -> Plan:
    """Decide from a transformers config alone how many units stay.

    Raises:
        ModelError: unknown architecture.
        RecipeError: a layer would be left without any unit, or no layer is left to prune.
    """
    coupling = couple(config)
    ratios = [options.ratio_of(layer, coupling.num_layers) for layer in range(coupling.num_layers)]
    if options.layer_ratios is None and options.ratio > 0 and not any(ratios):
        raise RecipeError(
            f"keep_first: {options.keep_first} and keep_last: {options.keep_last} leave none of the "
            f"{coupling.num_layers} layers to prune; lower them"
        )
    counts = {
        layer: {group.name: kept_units(group, ratio, options.round_to, layer) for group in coupling.groups}
        for layer, ratio in enumerate(ratios)
        if ratio > 0 and options.structure == "units"
    }
    full, per_layer = _measure(config, coupling, {})
    pruned, _ = _measure(config, coupling, counts)
    theoretical = pruned.parameters
    if options.structure != "units":
        theoretical -= sum(math.floor(per_layer[layer] * ratio) for layer, ratio in enumerate(ratios))
    return Plan(coupling, options, counts, full, pruned, theoretical)


def kept_units(group: Group, ratio: Fraction, round_to: int, layer: int) -> int:
    """Return units that stay: the paper rounds shared KV groups up and single heads and neurons down.

    Raises:
        RecipeError: none would.
    """
    exact = group.num_units * (1 - ratio)
    num_kept = math.ceil(exact) if group.rounds_up else math.floor(exact)
    if group.name == "mlp" and num_kept < group.num_units:
        num_kept -= num_kept % round_to
    if num_kept < 1:
        unit, least = ("neurons", round_to) if group.name == "mlp" else ("heads", 1)
        highest = math.floor(1000 * (1 - Fraction(least, group.num_units))) / 1000
        cure = f"it is at most {highest} for this model" if highest > 0 else "lower round_to"
        raise RecipeError(
            f"ratio: {float(ratio)} leaves none of the {group.num_units} {unit} of layer {layer}"
            f"{f' with round_to: {round_to}' if least > 1 else ''}; {cure}"
        )
    return num_kept


def _measure(config: Any, coupling: Coupling, counts: Counts) -> tuple[Size, list[int]]:
    """Size of the (pruned) model, and the coupled linear weights of each layer. A tied head counts once."""
    model = meta_model(config)
    head = model.get_output_embeddings()
    seen: set[int] = set()
    parameters = linear_parameters = nf4_bytes = 0
    per_layer = [0] * coupling.num_layers
    for path, module in model.named_modules():
        located = coupling.locate(path)
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            numel = math.prod(_pruned_shape(coupling, counts, located, name, parameter))
            parameters += numel
            if isinstance(module, nn.Linear) and module is not head and name == "weight":
                linear_parameters += numel
                nf4_bytes += nf4.weight_bytes(numel)
            else:
                nf4_bytes += 2 * numel
            if located and located[1] in coupling.linears and name == "weight":
                per_layer[located[0]] += numel
    return Size(parameters, linear_parameters, nf4_bytes), per_layer


def _pruned_shape(
    coupling: Coupling, counts: Counts, located: tuple[int, str] | None, name: str, parameter: nn.Parameter
) -> list[int]:
    shape = list(parameter.shape)
    if located is None or located[0] not in counts:
        return shape
    for side, axis in (("out", 0), ("in", 1)):
        coupled = coupling.member(located[1], side)  # type: ignore[arg-type]
        if coupled is not None and axis < len(shape):
            group, member = coupled
            shape[axis] = counts[located[0]][group.name] * member.width
    return shape

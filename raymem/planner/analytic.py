"""The terms that have a closed form, worked out from shapes and the recipe alone: the cross-check of the trace.

Nothing here runs a step. Weights, trainable weights with their masters, gradients and optimizer state must come out as
the trace has them, byte for byte; the figure for activations is a rough one, for models that cannot be traced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, assert_never

from torch import nn

from raymem.methods.chunked_loss.rows import CHUNK_BYTES, FEWEST_ROWS
from raymem.methods.loram.plan import nf4_weight_bytes
from raymem.methods.mlorc.config import MLorcAdamWOptions, MLorcLionOptions
from raymem.methods.moram.base import fan
from raymem.methods.moram.config import MoRAMOptions, connections
from raymem.planner.types import Target
from raymem.recipe.schema import AdamW, Checkpointing, NoAdapter, Recipe
from raymem.training.model.build import trainable_dtype

_NF4_TABLES_BYTES = 4 * (16 + 256 + 1)
"""Per 4-bit weight: the code of NF4, the code of the scales, and their offset, fp32."""
_COUNTER_BYTES = 4
"""Every optimizer keeps a step count per tensor, fp32."""


def closed_form(recipe: Recipe, target: Target, model: nn.Module) -> dict[str, int]:
    """Bytes of weights, trainable, gradients and optimizer of worker 0.

    Args:
        model: the recipe's, of which only names and shapes are read.
    """
    share = target.num_workers if recipe.scaling.strategy == "fsdp2" else 1
    weights = sum(_frozen_bytes(name, p, share) for name, p in model.named_parameters() if not p.requires_grad)
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(recipe.adapter, NoAdapter):
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    else:
        for name, layer in _tuned_layers(model):
            if (experts := _experts_shapes(layer)) is not None:
                shapes |= {f"{name}.{factor}": shape for factor, shape in zip("AB", experts, strict=True)}
                continue
            outputs, inputs = fan(layer.get_base_layer())
            rank = recipe.adapter.rank
            shapes |= {f"{name}.A": (rank, inputs), f"{name}.B": (outputs, rank)}
            if isinstance(recipe.adapter, MoRAMOptions):
                kept = connections(recipe.adapter.k, recipe.adapter.density, inputs, name)
                weights += 4 * outputs * kept + 8 * 3  # int32 indices, and what identifies the base
    weights += sum(b.numel() * b.element_size() for name, b in model.named_buffers() if ".moram_" not in name)
    width = trainable_dtype(recipe).itemsize
    masters = recipe.train.precision == "bf16" and recipe.train.master == "fp32"
    local = {name: _rows(shape, share) for name, shape in shapes.items()}
    trained = sum(math.prod(shape) for shape in local.values())
    trainable = trained * (width + (4 if masters else 0))
    gradients = 0 if getattr(recipe.optimizer, "step_in_backward", False) else trained * (4 if masters else width)
    optimizer = sum(_state_bytes(recipe, model, name, shapes[name], local[name]) for name in shapes)
    return {"weights": weights, "trainable": trainable, "gradients": gradients, "optimizer": optimizer}


def _rows(shape: tuple[int, ...], share: int) -> tuple[int, ...]:
    """What worker 0 has of a tensor that is sharded by rows."""
    return (-(-shape[0] // share), *shape[1:]) if shape else shape


def _frozen_bytes(name: str, parameter: Any, share: int) -> int:
    if type(parameter).__name__ == "Params4bit":
        return int(_NF4_TABLES_BYTES + nf4_weight_bytes(parameter.numel()))
    return int(math.prod(_rows(tuple(parameter.shape), share)) * parameter.element_size())


def _tuned_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer with an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield name, layer


def _experts_shapes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """A and B of weights that several experts share; PEFT has rules of its own for their ranks, which are taken as they
    come out. None of other layers."""
    from peft.tuners.lora.layer import ParamWrapper

    if not isinstance(layer, ParamWrapper):
        return None
    (factor_A,), (factor_B,) = layer.lora_A.values(), layer.lora_B.values()
    return tuple(factor_A.weight.shape), tuple(factor_B.weight.shape)


def _state_bytes(recipe: Recipe, model: nn.Module, name: str, shape: tuple[int, ...], local: tuple[int, ...]) -> int:
    options, numel = recipe.optimizer, math.prod(local)
    match options:
        case AdamW():
            rounding = recipe.train.precision == "bf16" and recipe.train.master == "stochastic_rounding"
            masters = recipe.train.precision == "bf16" and recipe.train.master == "fp32"
            width = 4 if rounding or masters else trainable_dtype(recipe).itemsize
            return 2 * numel * width + _COUNTER_BYTES
        case MLorcAdamWOptions() | MLorcLionOptions():
            moments = 2 if isinstance(options, MLorcAdamWOptions) else 1
            embedding = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
            if len(shape) != 2 or min(shape) < options.min_dim or (embedding and not options.compress_embeddings):
                return moments * numel * 4 + _COUNTER_BYTES
            width = 4 if options.factor_dtype == "fp32" else 2
            # Rows of the left factor lie with the rows of the weight, the right one is whole everywhere.
            return moments * options.rank * (local[0] + shape[1]) * width + _COUNTER_BYTES
    assert_never(options)  # a budget is refused on this figure, so nobody's stands in for another's


def rough_activations(recipe: Recipe, config: Any) -> int:
    """What one micro-batch keeps for backward, by a formula: within a factor of two, for models nobody could trace.

    Per layer and token 16 hidden sizes and 3 intermediate ones; with checkpointing one hidden size, and one layer
    whole.
    """
    text = config.get_text_config()
    hidden = getattr(text, "hidden_size", 1024)
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    layers = getattr(text, "num_hidden_layers", 12)
    width = 4 if recipe.train.precision == "fp32" else 2
    tokens = recipe.train.rows_per_pass * recipe.data.sequence_length
    layer = tokens * (16 * hidden + 3 * inner) * width
    kept = layers * tokens * hidden * width + layer if isinstance(recipe.activations, Checkpointing) else layers * layer
    return int(kept)


def rough_loss(recipe: Recipe, config: Any, *, chunked: bool) -> int:
    """What the loss of one micro-batch takes, by a formula: logits three times in fp32 and once in their own dtype, or
    in chunks the limit of one, and the gradient of the last hidden states."""
    text = config.get_text_config()
    width = 4 if recipe.train.precision == "fp32" else 2
    tokens = recipe.train.rows_per_pass * recipe.data.sequence_length
    if not chunked:
        return int((3 * 4 + (width if width < 4 else 0)) * tokens * text.vocab_size)
    kind = "cuda" if recipe.scaling.use_gpu else "cpu"
    chunk = min(max(CHUNK_BYTES[kind], FEWEST_ROWS[kind] * text.vocab_size * 4), 4 * tokens * text.vocab_size)
    return int(chunk + tokens * getattr(text, "hidden_size", 1024) * width)

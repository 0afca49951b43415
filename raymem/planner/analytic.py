"""Works out the terms that have a closed form from shapes and the recipe alone, to cross-check the trace.

Nothing here runs a step. Weights, trainable weights with their masters, gradients and optimizer state must come out as
the trace has them, byte for byte; the figure for activations is a rough one, for models that cannot be traced.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from raymem.kinds import LossFunction, TensorShape
from raymem.memory.host import lives_on_host
from raymem.memory.nf4 import weight_bytes
from raymem.planner.types import Target
from raymem.recipe.axes import ACTIVATIONS, ADAPTERS, OPTIMIZERS
from raymem.recipe.schema import Recipe
from raymem.training.model.build import trainable_dtype

_NF4_TABLES_BYTES = 4 * (16 + 256 + 1)
"""Bytes of each 4-bit weight's tables in fp32: the code of NF4, the code of the scales, and their offset."""


def closed_form(recipe: Recipe, target: Target, model: nn.Module) -> dict[str, int]:
    """Count the bytes of weights, trainable, gradients and optimizer on the device of worker 0.

    An optimizer without a closed form is left out.

    Args:
        model: the recipe's, of which only names and shapes are read.
    """
    share = target.num_workers if recipe.scaling.strategy == "fsdp2" else 1
    adapter, optimizer = ADAPTERS.of(recipe), OPTIMIZERS.of(recipe)
    shapes = adapter.trained_shapes(model, recipe.adapter)
    weights = adapter.buffer_bytes(model, recipe.adapter)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if target.kind == "cuda":
        frozen = {name: p for name, p in frozen.items() if not lives_on_host(p)}
    weights += sum(frozen_bytes(p, share) for p in frozen.values())
    weights += sum(b.numel() * b.element_size() for name, b in model.named_buffers() if not adapter.owns_buffer(name))
    width = trainable_dtype(recipe).itemsize
    low_precision = recipe.train.precision == "bf16"
    masters = low_precision and recipe.train.master == "fp32"
    local = {name: _rows(shape, share) for name, shape in shapes.items()}
    trained = sum(math.prod(shape) for shape in local.values())
    trainable = trained * (width + (4 if masters else 0))
    gradients = 0 if optimizer.frees_gradients(recipe.optimizer) else trained * (4 if masters else width)
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    tensors = [
        TensorShape(
            shape=shape,
            local=local[name],
            itemsize=4 if masters else width,
            rounded=low_precision and recipe.train.master == "stochastic_rounding",
            embedding=name in embeddings,
            sharded=recipe.scaling.strategy == "fsdp2",
        )
        for name, shape in shapes.items()
    ]
    states = [optimizer.state_bytes(recipe.optimizer, tensor) for tensor in tensors]
    apart = 0
    if target.kind == "cuda":
        apart = sum(optimizer.host_state_bytes(recipe.optimizer, tensor) for tensor in tensors)
    known = {"weights": weights, "trainable": trainable, "gradients": gradients}
    return known if None in states else {**known, "optimizer": sum(state or 0 for state in states) - apart}


def _rows(shape: tuple[int, ...], share: int) -> tuple[int, ...]:
    """Return worker 0's share of the elements of a tensor that is sharded by rows."""
    return (-(-shape[0] // share), *shape[1:]) if shape else shape


def frozen_bytes(parameter: Any, share: int) -> int:
    """Count the bytes of worker 0's share of a parameter, in 4 bits or as it is."""
    if type(parameter).__name__ == "Params4bit":
        return int(_NF4_TABLES_BYTES + weight_bytes(parameter.numel()))
    return int(math.prod(_rows(tuple(parameter.shape), share)) * parameter.element_size())


def rough_activations(recipe: Recipe, config: Any) -> int:
    """Estimate the bytes that one micro-batch keeps for backward, within a factor of two, for untraceable models.

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
    return ACTIVATIONS.of(recipe).rough_bytes(
        recipe.activations, layers=layers, layer_bytes=layer, input_bytes=tokens * hidden * width
    )


def rough_loss(recipe: Recipe, config: Any, loss: LossFunction) -> int:
    """Estimate the bytes that the loss of one micro-batch takes, by the formula of its kind."""
    text = config.get_text_config()
    return loss.rough_bytes(
        tokens=recipe.train.rows_per_pass * recipe.data.sequence_length,
        vocabulary=text.vocab_size,
        hidden_size=getattr(text, "hidden_size", 1024),
        itemsize=4 if recipe.train.precision == "fp32" else 2,
        device="cuda" if recipe.scaling.use_gpu else "cpu",
    )

"""How much memory one worker needs, for sizing its Pod."""

from __future__ import annotations

from typing import Any

from raymem.errors import ClusterError, RaymemError
from raymem.training.recipe import Checkpointing, ModelSection, Recipe
from raymem.training.recipe_io import MODELS, packaged_recipe, read_yaml


def worker_memory_bytes(recipe: Recipe, workers: int) -> int:
    """Upper estimate of the peak memory of one of ``workers`` workers.

    A closed form over the model built on the meta device, interim until the planner traces the step itself:

    * weights: every parameter in its dtype (0.6 bytes each under NF4), buffers;
    * trained parameters: gradient, two fp32 moments, and the fp32 master copy where there is one;
    * activations: ``16 hidden + 4 intermediate`` values per token and layer (with checkpointing: one per layer, and one
      layer in full), attention scores if it is eager, and three fp32 copies of the logits.

    Under FSDP2 weights and state are shared by the workers, but for two layers that are gathered whole.
    What raymem's own methods save on activations and moments is left out, so that the request is never too low.

    Raises:
        ClusterError: the model's config cannot be had on this machine.
    """
    try:
        model, config = _on_meta(recipe)
    except RaymemError as error:
        raise ClusterError(
            f"the memory of a worker cannot be worked out here ({error}); say it with --worker-memory, for example 40Gi"
        ) from error
    train = recipe.train
    nf4 = recipe.base.quantize == "nf4"
    weights = trained = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
            weights += parameter.numel() * parameter.element_size()
        else:
            weights += int(parameter.numel() * (0.6 if nf4 and parameter.dim() == 2 else parameter.element_size()))
    weights += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    stored = 2 if train.precision == "bf16" else 4
    master = 4 if train.precision == "bf16" and train.master == "fp32" else 0
    state = trained * (stored + 8 + master)

    layers, hidden = config.num_hidden_layers, config.hidden_size
    if recipe.scaling.strategy == "fsdp2" and workers > 1:
        whole = 2 * weights // max(layers, 1)
        weights, state = weights // workers + whole, state // workers
    value = 4 if train.precision == "fp32" else 2
    tokens = train.micro_batch * recipe.data.sequence_length
    layer = (16 * hidden + 4 * (getattr(config, "intermediate_size", None) or 4 * hidden)) * value
    if recipe.model.attention == "eager":
        layer += 2 * config.num_attention_heads * recipe.data.sequence_length * value
    checkpointed = isinstance(recipe.activations, Checkpointing)
    activations = tokens * (layers * hidden * value + layer if checkpointed else layers * layer)
    logits = 3 * 4 * tokens * config.vocab_size
    return int(weights + state + activations + logits)


def _on_meta(recipe: Recipe) -> tuple[Any, Any]:
    from raymem.training.model import build_model

    section = recipe.model
    if section.name in MODELS:  # not built yet, but its size is known
        raw = read_yaml(packaged_recipe(MODELS[section.name]))["model"]
        section = ModelSection(config=raw["config"], tokenizer="demo", dtype=section.dtype, attention=section.attention)
    adapter = recipe.adapter
    if getattr(adapter, "init_from", None):  # may lie where only the cluster sees it; its shape is the recipe's
        adapter = adapter.model_copy(update={"init_from": None})  # type: ignore[union-attr]
    model: Any = build_model(recipe.model_copy(update={"model": section, "adapter": adapter}), meta=True)
    return model, model.config.get_text_config()

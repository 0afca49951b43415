"""Shared parts of the LoRAct benchmarks: a Llama stack with LoRA, and the ways of keeping its activations.

No benchmark of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from raymem.methods.loract import compress_activations

MODES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "checkpoint": None,
    "layer": {"scope": "layer"},
    "sublayer": {"scope": "sublayer"},
    "layer, all compressed": {"scope": "layer", "first_input": "compressed"},
    "sublayer, all compressed": {"scope": "sublayer", "first_input": "compressed"},
    "linear": {"scope": "linear"},
}


def lora_llama(num_layers: int, *, hidden: int = 512, head: bool = False, length: int = 8192) -> nn.Module:
    """A Llama with random weights and LoRA r16 on every linear layer, in training mode; ``head``: with logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=4096, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=length,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = (AutoModelForCausalLM if head else AutoModel).from_config(config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()


@contextlib.contextmanager
def keeping(model: Any, mode: str, rank: float, **options: Any) -> Iterator[Any]:
    """The model with one of :data:`MODES`; yields the handle of LoRAct or None."""
    fields = MODES[mode]
    if fields is not None:
        with compress_activations(model, rank=rank, **{**fields, **options}) as handle:
            yield handle
        return
    base = model.get_base_model()
    if mode == "checkpoint":
        base.activation_checkpointing_enable()
        base.disable_input_require_grads()  # it would keep one more tensor, which non-reentrant checkpoints do not need
    try:
        yield None
    finally:
        if mode == "checkpoint":
            base.activation_checkpointing_disable()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(4096, (rows, length), generator=torch.Generator().manual_seed(1))

"""Tiny models of several architectures, with a batch of each, and their exact gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH = 32
_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.1}
_IMAGES = {"image_size": 24, "patch_size": 4, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen3": _GROUPED,
    "gpt_neox": {**_SHAPE, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "bert": _SHAPE,
    "vit": {**_SHAPE, **_IMAGES},
    "gemma3_text": {**_GROUPED, "sliding_window": 16},
    "qwen3_moe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {"vocab_size": 64, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "t5": {"vocab_size": 64, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
           "decoder_start_token_id": 0},
}  # fmt: skip


def build(family: str, **changes: Any) -> nn.Module:
    """A model in training mode whose parameters are all different."""
    import transformers as tf

    config = tf.AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    kinds = {"bert": tf.BertForMaskedLM, "vit": tf.ViTForImageClassification, "t5": tf.T5ForConditionalGeneration}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kinds[family](config) if family in kinds else tf.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return model.train()


def batch(family: str = "llama", rows: int = 4, length: int = 24) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    if family == "vit":
        images = torch.randn(rows, 3, 24, 24, generator=source)
        return {"pixel_values": images, "labels": torch.arange(rows) % 2}
    ids = torch.randint(64, (rows, length), generator=source)
    return {"input_ids": ids, "labels": ids}


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one pass with the same dropout each time."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative error of all gradients as one vector."""
    assert set(found) == set(exact)
    missed = sum(float((found[name] - value).double().square().sum()) for name, value in exact.items())
    return float(missed / sum(float(value.double().square().sum()) for value in exact.values())) ** 0.5


def lora(model: nn.Module, **options: Any) -> nn.Module:
    """The model with LoRA on every linear layer, B not zero."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return wrapped.train()

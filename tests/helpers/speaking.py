"""A model that says what a test wants it to: its next token is a function of the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers.templates import CHATML, tokenizer_for


def save_speaker(
    directory: Path, says: str, *, template: str | None = CHATML, stop: str = "<|im_end|>", eos: str = "<|im_end|>",
    context: int = 512, **config: Any,
) -> Path:  # fmt: skip
    """A Llama that answers any user's turn by ``says`` and ``stop``; behind every other token it stops.

    Args:
        says: tokens that differ from one another.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_for(template or "", eos)
    asked = "one"
    if template is None:
        tokenizer.chat_template = None
    else:
        talk = [{"role": "user", "content": asked}]
        asked = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.backend_tokenizer.encode(says, add_special_tokens=False).ids
    path = [tokenizer.backend_tokenizer.encode(asked, add_special_tokens=False).ids[-1], *ids]
    assert len({*path}) == len(path), "one token cannot be followed by two"
    vocabulary, end = len(tokenizer), tokenizer.convert_tokens_to_ids(stop)
    following = dict.fromkeys(range(vocabulary), end) | dict(zip(path, [*ids, end], strict=True))
    made = LlamaConfig(
        vocab_size=vocabulary, hidden_size=640, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=context, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, **config,
    )  # fmt: skip
    assert vocabulary <= 640
    model = LlamaForCausalLM(made)
    with torch.no_grad():
        layer: Any = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, 640))
        model.lm_head.weight.zero_()
        for token, successor in following.items():
            model.lm_head.weight[successor, token] = 1.0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

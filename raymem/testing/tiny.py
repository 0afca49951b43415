"""A tiny model, its tokenizer, texts to learn and random rows: what a test of training needs, made in a second."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raymem.training.data.batches import Batch

VOCABULARY = 128
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


def save_tiny_model(directory: Path, config: Mapping[str, Any] = TINY_LLAMA, *, max_shard_size: str = "5GB") -> Path:
    """Write a model directory with random fp32 weights and a tokenizer, as ``save_pretrained`` writes it.

    Args:
        config: a transformers config with its ``model_type``; its vocabulary has at least ``VOCABULARY`` tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoConfig.for_model(options.pop("model_type"), **options)
        model: Any = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
    with torch.no_grad():  # zeros and ones would hide a tensor that was never loaded
        for index, parameter in enumerate(model.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """Write a tokenizer of the words ``w0``, ``w1``, ... with ``VOCABULARY`` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<pad>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>").save_pretrained(directory)


def write_examples(path: Path, count: int, seed: int) -> None:
    """Write texts of 4 to 40 words in which a word says a good deal about the next."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        at, words = draw.randrange(100), []
        for _ in range(draw.randint(4, 40)):
            at = (3 * at + draw.randrange(3)) % 100
            words.append(f"w{at}")
        texts.append(" ".join(words))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def random_batch(rows: int, length: int, seed: int = 0, *, packed: bool = True) -> Batch:
    """Random tokens; packed rows hold two segments each, whose first tokens have no loss."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=source)
    positions = torch.arange(length).expand(rows, -1).clone()
    if packed:
        positions[:, length // 2 :] -= length // 2
    labels = ids.masked_fill(positions == 0, -100)
    return Batch(ids, labels, positions if packed else None, None)


def num_targets(*batches: Batch) -> int:
    """Return the number of tokens that have a loss."""
    return sum(int((batch.labels != -100).sum()) for batch in batches)

"""Tiny models of every family that LoRAM knows, in the shapes that could break it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raymem.methods.loram.pruning.job import PruneJob
from raymem.methods.loram.pruning.steps import run_step, steps

VOCABULARY = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_MHA = {**_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_GQA = {**_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
_WIDE = {**_GQA, "head_dim": 8}  # heads wider than the hidden size

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_GQA},
    "llama_mha": {"model_type": "llama", **_MHA, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **_GQA, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", **_GQA},
    "qwen3": {"model_type": "qwen3", **_WIDE, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **_WIDE, "sliding_window": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        **_WIDE,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granite": {"model_type": "granite", **_GQA},
    "phi3": {"model_type": "phi3", **_GQA},
    "phi3_mha": {"model_type": "phi3", **_MHA, "partial_rotary_factor": 0.5},
    "gpt_neox": {"model_type": "gpt_neox", **_MHA},
    "opt": {"model_type": "opt", **_MHA, "ffn_dim": 48, "word_embed_proj_dim": 32},
}


def config_of(family: str, **changes: Any) -> Any:
    options = {**FAMILIES[family], **changes}
    return AutoConfig.for_model(options.pop("model_type"), **options)


def random_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A full model with random fp32 weights, none of them zero or one, of a scale at which every layer matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(family, **changes))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + index))
            parameter += noise * (parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.2)
    return model.eval()


def save(directory: Path, family: str = "llama", *, shard: str = "5GB", dtype: Any = None, **changes: Any) -> Path:
    """A model directory as ``save_pretrained`` writes it."""
    model = random_model(family, **changes)
    if dtype is not None:
        model.to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def token_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def run_turned(job: PruneJob) -> None:
    """Do the steps of a job in the order most unlike its own that ``after`` allows, each of them twice."""
    waiting = list(reversed(steps(job)))
    done: set[str] = set()
    while waiting:
        step = next(step for step in waiting if done.issuperset(step.after))
        run_step(job, step)
        run_step(job, step)
        done.add(step.name)
        waiting.remove(step)

"""One list of tiny models of many architectures, of every kind that transformers has for causal language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 128
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_SHAPE = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_MHA = {**_SHAPE, "num_key_value_heads": 4}
_GQA = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 8}
_WINDOW = {**_GQA, "sliding_window": 16}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_N = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_N_IDS = {**_N, "bos_token_id": 0, "eos_token_id": 0}
_PER_TOKEN = {"num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, **_PER_TOKEN, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, **_PER_TOKEN}
_ROUTED = {"n_routed_experts": 4, **_PER_TOKEN, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_STATE = {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LLAMA4 = {**_GQA, **_LOCAL, "intermediate_size_mlp": 64, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
_IMAGES = {"image_size": 28, "patch_size": 14, "hidden_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    # dense
    "llama": {**_GQA, "tie_word_embeddings": False},
    "llama_tied": {"model_type": "llama", **_GQA, "tie_word_embeddings": True},
    "qwen2": _GQA,
    "qwen3": _GQA,
    "gemma": _GQA,
    "granite": {**_GQA, "logits_scaling": 4.0},
    "olmo": _GQA,
    "olmo2": _GQA,
    "glm": _GQA,
    "glm4": _GQA,
    "smollm3": _GQA,
    "seed_oss": _GQA,
    "helium": _GQA,
    "arcee": _GQA,
    "apertus": _GQA,
    "ernie4_5": _GQA,
    "hunyuan_v1_dense": _GQA,
    "diffllama": _GQA,
    "doge": _GQA,
    "bitnet": _GQA,
    "nanochat": _GQA,
    "stablelm": _GQA,
    "starcoder2": _GQA,
    "nemotron": _GQA,
    "phi": _MHA,
    "opt": {**_SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gptj": {**_N_IDS, "rotary_dim": 4},
    "gpt_neo": {**_SHAPE, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "window_size": 16},
    "gpt2": _N_IDS,
    "openai-gpt": _N,
    "ctrl": {**_N, "dff": 64},
    "biogpt": _SHAPE,
    "xglm": {**_IDS, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4,
             "max_position_embeddings": 64},
    "minicpm3": {**_MHA, **_LATENT},
    # fused query, key and value; one key for all heads; ALiBi
    "phi3": _GQA,
    "gpt_neox": _SHAPE,
    "codegen": {**_N_IDS, "n_ctx": 64, "rotary_dim": 4},
    "persimmon": _SHAPE,
    "gpt_bigcode": {**_N_IDS, "multi_query": True},
    "falcon": {**_SHAPE, "multi_query": True},
    "falcon_alibi": {"model_type": "falcon", **_SHAPE, "alibi": True, "multi_query": False, "num_kv_heads": 4},
    "bloom": {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    # sliding windows, soft caps, scaled logits
    "mistral": _WINDOW,
    "ministral": _WINDOW,
    "gemma2": {**_WINDOW, "final_logit_softcapping": 0.2},
    "gemma3_text": _WINDOW,
    "gemma3n_text": {**_WINDOW, **_MIXED, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
                     "laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
                     "altup_num_inputs": 2},
    "gemma4_text": {**_WINDOW, **_MIXED, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
                    "global_head_dim": 8, "num_kv_shared_layers": 0},
    "vaultgemma": _WINDOW,
    "cohere": {**_GQA, "logit_scale": 0.25},
    "cohere2": _WINDOW,
    "olmo3": _WINDOW,
    "exaone4": _WINDOW,
    # mixtures of experts
    "mixtral": {**_WINDOW, **_LOCAL},
    "qwen2_moe": {**_GQA, **_EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_moe": {**_GQA, **_EXPERTS},
    "olmoe": {**_GQA, "num_experts": 4, **_PER_TOKEN},
    "flex_olmo": {**_GQA, "num_experts": 4, **_PER_TOKEN},
    "granitemoe": {**_GQA, **_LOCAL},
    "gpt_oss": {**_WINDOW, **_LOCAL, **_MIXED},
    "deepseek_v2": {**_MHA, **_LATENT, **_ROUTED, "first_k_dense_replace": 1, "head_dim": 8},
    "deepseek_v3": {**_MHA, **_LATENT, **_ROUTED, "first_k_dense_replace": 1, "head_dim": 8},
    "glm4_moe": {**_GQA, **_ROUTED, "first_k_dense_replace": 1},
    "ernie4_5_moe": {**_GQA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16,
                     "moe_layer_start_index": 0},
    "hunyuan_v1_moe": {**_GQA, "num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 16},
    "longcat_flash": {**_MHA, **_LATENT, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
                      "expert_ffn_hidden_size": 16, "ffn_hidden_size": 64, "num_layers": 2, "head_dim": 8},
    "afmoe": {**_WINDOW, **_EXPERTS, **_MIXED, "num_dense_layers": 1},
    "minimax_m2": {**_GQA, **_LOCAL},
    "phimoe": {**_GQA, **_LOCAL},
    "jetmoe": {**_SHAPE, "num_key_value_heads": 2, "kv_channels": 8, **_LOCAL},
    "llama4_text": _LLAMA4,
    # recurrent, and hybrids of attention and a state
    "mamba": _STATE,
    "falcon_mamba": _STATE,
    "mamba2": {**_STATE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "rwkv": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
             "intermediate_size": 64, "context_length": 64, "bos_token_id": 0, "eos_token_id": 0},
    "xlstm": {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4},
    "jamba": {**_SHAPE, "num_key_value_heads": 2, "num_experts": 4, **_PER_TOKEN, "attn_layer_period": 2,
              "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
              "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "bamba": {**_SHAPE, "num_key_value_heads": 2, "attn_layer_indices": [1], **_MAMBA2},
    "zamba2": {**_MHA, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 16,
               "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "falcon_h1": {**_GQA, "mamba_d_ssm": 64, **_MAMBA2},
    "granitemoehybrid": {**_GQA, **_LOCAL, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16,
                         **_MAMBA2},
    "nemotron_h": {**_GQA, "layers_block_type": ["mamba", "attention"], "hybrid_override_pattern": "M*",
                   "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    "recurrent_gemma": {**_GQA, "lru_width": 32, "attention_window_size": 16,
                        "block_types": ["recurrent", "attention"]},
    "minimax": {**_GQA, **_LOCAL, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "lfm2": {**_GQA, "layer_types": ["conv", "full_attention"], "block_dim": 32, "block_ff_dim": 64},
    "qwen3_next": {**_GQA, **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**_GQA, **_DELTA},
    # models that see images too, given text
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **_WINDOW},
        "vision_config": {"model_type": "siglip_vision_model", **_IMAGES, "intermediate_size": 32,
                          "num_hidden_layers": 1, "num_attention_heads": 2},
        "mm_tokens_per_image": 4, "image_token_index": 126, "boi_token_index": 124, "eoi_token_index": 125,
    },
    "mllama": {
        "text_config": {**_GQA, "cross_attention_layers": [1],
                        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "vision_config": {**_IMAGES, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1,
                          "attention_heads": 2, "vision_output_dim": 32, "intermediate_layers_indices": [0]},
    },
}  # fmt: skip
"""Name -> config, with ``model_type`` where the name is another."""

SOME = (
    "llama_tied",
    "gpt2",
    "gemma2",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "mamba",
    "qwen3_next",
    "gemma3",
    "mllama",
)
"""One of every kind that differs in how it is trained, for what takes longer."""


def options_of(name: str, **changes: Any) -> dict[str, Any]:
    """The config as a recipe has it under ``model.config``."""
    return {"model_type": name, **FAMILIES[name], **changes}


def config_of(name: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    options = options_of(name, **changes)
    return AutoConfig.for_model(options.pop("model_type"), **options)


def random_model(name: str, **changes: Any) -> Any:
    """A model with random fp32 weights, none of them zero or one, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(name, **changes))
    with torch.no_grad():  # zeros and ones would hide a tensor that was never loaded
        for index, parameter in enumerate(model.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return model.eval()


def save(directory: Path, name: str, *, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """A model directory as ``save_pretrained`` writes it."""
    random_model(name, **changes).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def fragment(name: str, **changes: Any) -> dict[str, Any]:
    """The part of a recipe that names a random model of a family, with packing that every one can have."""
    return {
        "model": {"name": None, "config": options_of(name, **changes), "tokenizer": "demo"},
        "data": {"packing": "none"},
    }

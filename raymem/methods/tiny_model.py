"""Builds small clones of a model: the same class and options with small sizes and random weights, to try things on.

What holds for an architecture (whether its layers can be pruned so, whether its loss can be taken in chunks) is asked
of such a clone in a second, instead of being looked up in a list of names.
"""

from __future__ import annotations

from typing import Any

import torch

from raymem.seeds import generator

HEAD_DIM, NEURONS, VOCABULARY, LAYERS = 16, 24, 32, 3
_KV_GROUPS = 4
_STATE_SPACE_HEADS = (("expand", "num_heads"), ("mamba_expand", "mamba_n_heads"), ("mamba_expand", "n_mamba_heads"))
_NOT_SIZES = ("quantization_config", "auto_map", "raymem_pruning", "_name_or_path")
_TOWER_LAYERS = ("num_hidden_layers", "num_global_layers", "depth")
_SIZES = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": HEAD_DIM,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": NEURONS,
    "moe_intermediate_size": NEURONS,
    "shared_expert_intermediate_size": NEURONS,
    "ffn_dim": NEURONS,
    "n_inner": NEURONS,
    "rotary_dim": HEAD_DIM // 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": HEAD_DIM,
    "kv_lora_rank": HEAD_DIM,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_head_dim": 2 * HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "num_kv_shared_layers": 0,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "linear_head_dim": HEAD_DIM,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_head": HEAD_DIM,
    "mamba_headdim": HEAD_DIM,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
}
"""Maps options of a transformers config to their values in a clone, where the model has them."""


def tiny_config(config: Any, *, all_layers: bool = False) -> Any:
    """Return a config of the same class and options with small layers and the same head grouping.

    Args:
        all_layers: as many as the model has, under the same names; by default at most three.

    Keeps what decides how modules fit together: heads per KV group, whether head size times heads is the hidden size,
    biases, fused layers, kinds of attention, tied embeddings, and every scalar (scalings, soft caps).
    """
    values: dict[str, Any] = config.to_dict()
    text = values
    for name, part in values.items():
        if isinstance(part, dict) and name == "text_config":
            text = part
        elif isinstance(part, dict) and name.endswith("_config"):  # a tower that text never passes through
            part.update({option: 1 for option in _TOWER_LAYERS if option in part})
    for name in _NOT_SIZES:
        values.pop(name, None)
        text.pop(name, None)
    _shrink(text, config.get_text_config(), all_layers=all_layers)
    values["dtype"] = "float32"
    return type(config).from_dict(values)


def _shrink(values: dict[str, Any], config: Any, *, all_layers: bool) -> None:
    all_heads, depth = getattr(config, "num_attention_heads", None) or 1, config.num_hidden_layers
    layers = depth if all_layers else min(LAYERS, depth)
    groups = values.get("num_key_value_heads") or all_heads
    queries = all_heads // groups
    groups = min(groups, _KV_GROUPS)
    heads = groups * queries
    head_dim = values.get("head_dim")
    independent = head_dim is not None and head_dim * all_heads != config.hidden_size
    hidden = heads * (HEAD_DIM + 8 if independent else HEAD_DIM)
    sizes = {
        **_SIZES,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "n_head": heads,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "n_embd": hidden,
        "d_model": hidden,
        "embedding_dim": hidden,
        "attention_hidden_size": values.get("attention_hidden_size", 0) * hidden // config.hidden_size,
        "attention_head_dim": values.get("attention_hidden_size", 0) * hidden // config.hidden_size // heads,
    }
    sizes |= dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_blocks", "num_hidden_layers"), layers)
    values.update({name: size for name, size in sizes.items() if values.get(name) is not None})
    if head_dim is not None:
        values["head_dim"] = HEAD_DIM
    for expand, count in _STATE_SPACE_HEADS:
        if expand in values and count in values:  # heads of a state space share what the hidden size expands to
            values[count] = int(values[expand] * hidden) // HEAD_DIM
    if values.get("mamba_d_ssm") is not None:
        values["mamba_d_ssm"] = values["mamba_n_heads"] * HEAD_DIM
    if values.get("linear_num_key_heads") is not None:
        values["linear_num_value_heads"] = 2 * values["linear_num_value_heads"] // values["linear_num_key_heads"]
        values["linear_num_key_heads"] = 2
    if values.get("sliding_window") is not None:
        values["sliding_window"] = 5  # shorter than the text, so that it counts
    if layers < depth:
        _leave_out_layers(values, depth, layers)
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":  # its factors are per frequency, hence of the real head size
        plain = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        values["rope_parameters"] = {"rope_type": "default", **plain}


def _leave_out_layers(values: dict[str, Any], count: int, layers: int) -> None:
    """Shorten the lists of a config that have an entry for each layer."""
    for name, value in values.items():
        if name == "layer_types" and value:
            kinds = sorted(set(value))
            values[name] = [kinds[layer % len(kinds)] for layer in range(layers)]
        elif isinstance(value, list) and len(value) == count:  # one entry per layer
            values[name] = value[:layers]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):  # by number of the layer
            values[name] = {key: part for key, part in value.items() if int(key) < layers}


def random_weights(model: Any) -> Any:
    """Give a model weights of a scale at which every layer matters, biases and norms included; in evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator(0, "tiny model", name))
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3
            parameter.add_(scale * noise)
    return model.eval()


def random_clone(config: Any, *, kind: Any = None, all_layers: bool = False, attention: str | None = None) -> Any:
    """Build a small causal language model of the class of ``config``, on the CPU in fp32; always the same one.

    Args:
        kind: class of the model; by default the one that transformers has for such a config.
        all_layers: as of :func:`tiny_config`.
        attention: implementation of transformers; None is its choice.

    Raises:
        Exception: whatever transformers raises where the small sizes do not go together.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = tiny_config(config, all_layers=all_layers)
        if kind is None:
            model = AutoModelForCausalLM.from_config(small, attn_implementation=attention, trust_remote_code=False)
        else:
            model = kind._from_config(small, attn_implementation=attention)
        return random_weights(model)

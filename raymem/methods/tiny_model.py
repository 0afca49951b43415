"""Small clones of a model: the same class and options with small sizes and random weights, to try things on.

What holds for an architecture (whether its layers can be pruned so, whether its loss can be taken in chunks) is asked
of such a clone in a second, instead of being looked up in a list of names.
"""

from __future__ import annotations

from typing import Any

import torch

from raymem.seeds import generator

HEAD_DIM, NEURONS, VOCABULARY, LAYERS = 16, 24, 32, 3
_KV_GROUPS = 4
_NOT_SIZES = ("quantization_config", "auto_map", "raymem_pruning", "_name_or_path")
_SIZES = {
    "n_layer": LAYERS,
    "num_layers": LAYERS,
    "num_hidden_layers": LAYERS,
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
    "v_head_dim": HEAD_DIM,
    "num_kv_shared_layers": 0,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_head": HEAD_DIM,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
}
"""Option of a transformers config -> its value in a clone, where the model has it."""


def tiny_config(config: Any) -> Any:
    """A config of the same class and options with three small layers and the same head grouping.

    Keeps what decides how modules fit together: heads per KV group, whether head size times heads is the hidden size,
    biases, fused layers, kinds of attention, tied embeddings, and every scalar (scalings, soft caps).
    """
    values: dict[str, Any] = config.to_dict()
    text = values
    for name, part in values.items():
        if isinstance(part, dict) and name == "text_config":
            text = part
        elif isinstance(part, dict) and name.endswith("_config"):  # a tower that text never passes through
            part.update({option: 1 for option in ("num_hidden_layers", "depth") if option in part})
    for name in _NOT_SIZES:
        values.pop(name, None)
        text.pop(name, None)
    _shrink(text, config.get_text_config())
    values["dtype"] = "float32"
    return type(config).from_dict(values)


def _shrink(values: dict[str, Any], config: Any) -> None:
    all_heads, all_layers = getattr(config, "num_attention_heads", None) or 1, config.num_hidden_layers
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
    }
    values.update({name: size for name, size in sizes.items() if values.get(name) is not None})
    if head_dim is not None:
        values["head_dim"] = HEAD_DIM
    for expand, count in (("expand", "num_heads"), ("mamba_expand", "mamba_n_heads")):
        if expand in values and count in values:  # heads of a state space share what the hidden size expands to
            values[count] = int(values[expand] * hidden) // HEAD_DIM
    if values.get("mamba_d_ssm") is not None:
        values["mamba_d_ssm"] = values["mamba_n_heads"] * HEAD_DIM
    if values.get("sliding_window") is not None:
        values["sliding_window"] = 5  # shorter than the text, so that it counts
    for name, value in values.items():
        if name == "layer_types" and value:
            kinds = sorted(set(value))
            values[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
        elif isinstance(value, list) and len(value) == all_layers:  # one entry per layer
            values[name] = value[:LAYERS]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):  # by number of the layer
            values[name] = {key: part for key, part in value.items() if int(key) < LAYERS}
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":  # its factors are per frequency, hence of the real head size
        plain = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        values["rope_parameters"] = {"rope_type": "default", **plain}


def random_weights(model: Any) -> Any:
    """The model with weights of a scale at which every layer matters, biases and norms included; in evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator(0, "tiny model", name))
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3
            parameter.add_(scale * noise)
    return model.eval()


def random_clone(config: Any) -> Any:
    """A small causal language model of the class of ``config``, on the CPU in fp32; always the same one.

    Raises:
        Exception: whatever transformers raises where the small sizes do not go together.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return random_weights(AutoModelForCausalLM.from_config(tiny_config(config)))

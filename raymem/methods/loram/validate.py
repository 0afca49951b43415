"""Proof by machine that a coupling is right, before anything large is read.

A model whose pruned units are zero computes the same as the model without them exactly if the rows and columns of a
unit are what the coupling says. So three layers of the same class, tiny but with the ratios of the real config, are
built with random weights, pruned, and compared. It takes about a second on one core.
"""

from __future__ import annotations

from typing import Any

import torch

from raymem.errors import ModelError
from raymem.methods.loram.coupling import Coupling, couple
from raymem.methods.loram.nonuniform import PRUNING_KEY, from_config, with_counts
from raymem.methods.loram.placement import Kept, put, take
from raymem.seeds import generator

_HEAD_DIM, _KV_GROUPS, _NEURONS, _VOCABULARY, _LENGTH = 16, 4, 24, 32, 12
_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit. Norms compute in fp32; a wrong spec is off by 0.1."""


def validate_coupling(config: Any) -> float:
    """Check the coupling of a config's architecture on a tiny clone.

    Returns:
        The largest difference of logits between the pruned clone and the one with zeros, relative to the largest logit.

    Raises:
        ModelError: unknown architecture, or the coupling does not hold for this config.
    """
    small = tiny_config(config)
    coupling = couple(small)
    kept: dict[int, dict[str, list[int]]] = {}
    for layer in (1, 2):
        kept[layer] = {group.name: _some(group.num_units, layer, group.name) for group in coupling.groups}
    full = _random_model(small)
    state = full.state_dict()
    try:
        pruned = from_config(with_counts(small, {i: {g: len(u) for g, u in k.items()} for i, k in kept.items()}))
        pruned.load_state_dict({name: take(coupling, kept, name, value) for name, value in state.items()})
        ids = torch.randint(3, _VOCABULARY, (2, _LENGTH), generator=generator(0, "loram", "validate"))
        original, found = _logits(full, ids), _logits(pruned.eval(), ids)
        full.load_state_dict(zeroed(coupling, kept, state))
        expected = _logits(full, ids)
    except (RuntimeError, AttributeError, KeyError) as error:
        raise ModelError(f"{_refused(config)}: a pruned clone cannot be built or run ({error})") from None
    difference = float((found - expected).abs().max() / expected.abs().max())
    pruning_matters = float((original - expected).abs().max() / expected.abs().max()) > 100 * _TOLERANCE
    if not difference <= _TOLERANCE or not pruning_matters:
        raise ModelError(
            f"{_refused(config)}: on a clone of 3 layers, removing units and zeroing them differ by {difference:.1e} "
            f"of the largest logit (at most {_TOLERANCE:.0e} is right)"
        )
    return difference


def zeroed(coupling: Coupling, kept: Kept, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A full state dict with zeros in all rows, columns and biases of pruned units."""
    return {name: put(coupling, kept, name, take(coupling, kept, name, value)) for name, value in state.items()}


def tiny_config(config: Any) -> Any:
    """A config of the same class and options with three small layers and the same head grouping.

    Keeps what decides the coupling: heads per KV group, whether head size times heads is the hidden size, biases,
    fused layers, kinds of attention, tied embeddings.
    """
    values: dict[str, Any] = config.to_dict()
    for name in ("quantization_config", "auto_map", PRUNING_KEY):
        values.pop(name, None)
    groups = values.get("num_key_value_heads") or config.num_attention_heads
    queries = config.num_attention_heads // groups
    groups = min(groups, _KV_GROUPS)
    heads = groups * queries
    head_dim = values.get("head_dim")
    independent = head_dim is not None and head_dim * config.num_attention_heads != config.hidden_size
    hidden = heads * (_HEAD_DIM + 8 if independent else _HEAD_DIM)
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "intermediate_size": _NEURONS,
        "ffn_dim": _NEURONS,
        "num_hidden_layers": 3,
        "vocab_size": _VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    values.update({name: size for name, size in sizes.items() if name in values})
    if head_dim is not None:
        values["head_dim"] = _HEAD_DIM
    if values.get("sliding_window") is not None:
        values["sliding_window"] = 5  # shorter than the text, so that it counts
    if values.get("layer_types"):
        kinds = sorted(set(values["layer_types"]))
        values["layer_types"] = [kinds[layer % len(kinds)] for layer in range(3)]
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":  # its factors are per frequency, hence of the real head size
        plain = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        values["rope_parameters"] = {"rope_type": "default", **plain}
    values["dtype"] = "float32"
    return type(config).from_dict(values)


def _some(num_units: int, layer: int, group: str) -> list[int]:
    """A random non-empty proper subset where there is one; more than half, so that an order can go wrong."""
    order = torch.randperm(num_units, generator=generator(0, "loram", "validate", layer, group))
    return sorted(order[: max(1, num_units - num_units // 4 - layer + 1)].tolist())


def _random_model(config: Any) -> Any:
    """Weights of a scale at which every layer matters, biases and norms included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator(0, "loram", "validate", name))
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3
            parameter.add_(scale * noise)
    return model.eval()


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.double()
    return logits


def _refused(config: Any) -> str:
    return f"model.name: the coupling of model_type {config.model_type!r} does not hold for this config"

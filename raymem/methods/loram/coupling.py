"""Declares the rows and columns of linear layers that belong to one prunable unit, family by family.

A *unit* is a KV group (its key and value head with the query heads that read it) or an MLP neuron. Removing one removes
rows ("out", with their biases) of some linear layers of a decoder layer and columns ("in") of others; those are the
*members* of its group. The same declaration drives scoring, slicing, recovery and every check, and it is verified by
machine (:mod:`raymem.methods.loram.validate`) before anything is pruned.

Legend: U units kept, N units of the full model, W indices per unit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from raymem.errors import ModelError

Side = Literal["out", "in"]


@dataclass(frozen=True)
class Member:
    """One side of one linear layer.

    Unit ``u`` owns ``[offset + u * width, offset + (u + 1) * width)`` of every segment ``(offset, width)``.
    """

    module: str
    """Path below the decoder layer, for example ``self_attn.q_proj``."""
    side: Side
    segments: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        """Indices that one unit owns."""
        return sum(width for _, width in self.segments)

    def indices(self, units_U: torch.Tensor) -> torch.Tensor:
        """Return indices [U * width] (int64, ascending if the units are) that these units own along this side."""
        parts = [
            (offset + units_U[:, None] * width + torch.arange(width)).reshape(-1) for offset, width in self.segments
        ]
        return torch.cat(parts)

    def per_unit(self, values: torch.Tensor, num_units: int) -> torch.Tensor:
        """Return sums [N] of ``values`` [N * width], one per index of this side, over the indices of each unit."""
        parts = [
            values[offset : offset + num_units * width].view(num_units, width).sum(1) for offset, width in self.segments
        ]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class Group:
    """Units of one kind in one decoder layer, and all that belongs to them."""

    name: str
    """``attn`` or ``mlp``."""
    num_units: int
    members: tuple[Member, ...]
    rounds_up: bool = False
    """Whether a fraction of a unit stays (the paper's rule for KV groups shared by several query heads)."""


@dataclass(frozen=True)
class Coupling:
    """The coupling of one model."""

    model_type: str
    num_layers: int
    layers: str
    """Path of the list of decoder layers."""
    groups: tuple[Group, ...]

    def prefix(self, layer: int) -> str:
        """Prefix of the names of a decoder layer's tensors."""
        return f"{self.layers}.{layer}."

    def locate(self, name: str) -> tuple[int, str] | None:
        """Return (layer, path below it) of a dotted name inside a decoder layer, else None."""
        if not name.startswith(f"{self.layers}."):
            return None
        number, _, rest = name[len(self.layers) + 1 :].partition(".")
        return (int(number), rest) if number.isdigit() else None

    def member(self, module: str, side: Side) -> tuple[Group, Member] | None:
        """Return the group and member that a side of a linear layer belongs to, if it is coupled."""
        for group in self.groups:
            for member in group.members:
                if (member.module, member.side) == (module, side):
                    return group, member
        return None

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all coupled linear layers of a decoder layer, in the order of the declaration."""
        return tuple(dict.fromkeys(member.module for group in self.groups for member in group.members))


@dataclass(frozen=True)
class Family:
    """Facts about one ``model_type`` of transformers."""

    package: str
    """``transformers.models.<package>.modeling_<package>`` defines the layer class."""
    layer_class: str
    layers: str
    groups: Callable[[Any], tuple[Group, ...]]
    adjust: Callable[[nn.Module, Any, int], None] | None = None
    """Mends a resized layer (layer, config, kept KV groups) whose forward reads head counts."""


def couple(config: Any) -> Coupling:
    """Return the coupling of a transformers config.

    Raises:
        ModelError: the architecture is not among :data:`FAMILIES`.
    """
    family = family_of(config)
    return Coupling(config.model_type, config.num_hidden_layers, family.layers, family.groups(config))


def family_of(config: Any) -> Family:
    """Return the family of a transformers config.

    Raises:
        ModelError: the architecture is not among :data:`FAMILIES`.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"model.name: LoRAM does not know how the layers of model_type {config.model_type!r} are coupled; "
            f"it prunes {', '.join(FAMILIES)}"
        )
    return family


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _attention(config: Any, *members: Member) -> Group:
    heads = config.num_attention_heads
    kv_groups = getattr(config, "num_key_value_heads", None) or heads
    return Group("attn", kv_groups, members, rounds_up=kv_groups != heads)


def _llama_like(config: Any) -> tuple[Group, ...]:
    """Separate q, k, v and gate, up. Norms of queries and keys span one head and stay as they are."""
    width = _head_dim(config)
    queries = width * (config.num_attention_heads // config.num_key_value_heads)
    return (
        _attention(
            config,
            Member("self_attn.q_proj", "out", ((0, queries),)),
            Member("self_attn.k_proj", "out", ((0, width),)),
            Member("self_attn.v_proj", "out", ((0, width),)),
            Member("self_attn.o_proj", "in", ((0, queries),)),
        ),
        Group(
            "mlp",
            config.intermediate_size,
            (
                Member("mlp.gate_proj", "out", ((0, 1),)),
                Member("mlp.up_proj", "out", ((0, 1),)),
                Member("mlp.down_proj", "in", ((0, 1),)),
            ),
        ),
    )


def _phi3(config: Any) -> tuple[Group, ...]:
    """Couple one linear layer with rows [q | k | v], one with rows [gate | up]."""
    width, neurons = _head_dim(config), config.intermediate_size
    queries = width * (config.num_attention_heads // config.num_key_value_heads)
    keys_at = width * config.num_attention_heads
    values_at = keys_at + width * config.num_key_value_heads
    return (
        _attention(
            config,
            Member("self_attn.qkv_proj", "out", ((0, queries), (keys_at, width), (values_at, width))),
            Member("self_attn.o_proj", "in", ((0, queries),)),
        ),
        Group(
            "mlp",
            neurons,
            (
                Member("mlp.gate_up_proj", "out", ((0, 1), (neurons, 1))),
                Member("mlp.down_proj", "in", ((0, 1),)),
            ),
        ),
    )


def _gpt_neox(config: Any) -> tuple[Group, ...]:
    """Couple one linear layer with rows [head][q | k | v]."""
    width = _head_dim(config)
    return (
        _attention(
            config,
            Member("attention.query_key_value", "out", ((0, 3 * width),)),
            Member("attention.dense", "in", ((0, width),)),
        ),
        Group(
            "mlp",
            config.intermediate_size,
            (Member("mlp.dense_h_to_4h", "out", ((0, 1),)), Member("mlp.dense_4h_to_h", "in", ((0, 1),))),
        ),
    )


def _opt(config: Any) -> tuple[Group, ...]:
    width = _head_dim(config)
    return (
        _attention(
            config,
            Member("self_attn.q_proj", "out", ((0, width),)),
            Member("self_attn.k_proj", "out", ((0, width),)),
            Member("self_attn.v_proj", "out", ((0, width),)),
            Member("self_attn.out_proj", "in", ((0, width),)),
        ),
        Group("mlp", config.ffn_dim, (Member("fc1", "out", ((0, 1),)), Member("fc2", "in", ((0, 1),)))),
    )


class _OtherHeadCount:
    """A layer's view of the shared config with its own number of query heads.

    A copy of the config would no longer follow ``model.set_attn_implementation``.
    """

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self.shared = config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name == "shared":  # only while a copy is being made
            raise AttributeError(name)
        return getattr(self.shared, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OtherHeadCount:
        return _OtherHeadCount(copy.deepcopy(self.shared, memo), self.num_attention_heads)


def _adjust_phi3(layer: Any, config: Any, kept_groups: int) -> None:
    heads = kept_groups * (config.num_attention_heads // config.num_key_value_heads)
    layer.self_attn.config = _OtherHeadCount(config, heads)
    layer.self_attn.num_key_value_heads = kept_groups


def _adjust_opt(layer: Any, config: Any, kept_groups: int) -> None:
    layer.self_attn.num_heads = kept_groups


def _llama_family(package: str, layer_class: str) -> Family:
    return Family(package, layer_class, "model.layers", _llama_like)


FAMILIES: dict[str, Family] = {
    "llama": _llama_family("llama", "LlamaDecoderLayer"),
    "mistral": _llama_family("mistral", "MistralDecoderLayer"),
    "qwen2": _llama_family("qwen2", "Qwen2DecoderLayer"),
    "qwen3": _llama_family("qwen3", "Qwen3DecoderLayer"),
    "gemma2": _llama_family("gemma2", "Gemma2DecoderLayer"),
    "gemma3_text": _llama_family("gemma3", "Gemma3DecoderLayer"),
    "granite": _llama_family("granite", "GraniteDecoderLayer"),
    "phi3": Family("phi3", "Phi3DecoderLayer", "model.layers", _phi3, _adjust_phi3),
    "gpt_neox": Family("gpt_neox", "GPTNeoXLayer", "gpt_neox.layers", _gpt_neox),
    "opt": Family("opt", "OPTDecoderLayer", "model.decoder.layers", _opt, _adjust_opt),
}
"""``model_type`` of transformers -> what is known about it. Mixtures of experts and norms over all heads are absent."""

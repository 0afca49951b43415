"""The declared couplings: indices against straight-line ones, and the machine's own proof, also of its teeth."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Phi3Config

from raymem.errors import ModelError
from raymem.methods.loram import coupling as coupling_module
from raymem.methods.loram.coupling import Group, Member, couple
from raymem.methods.loram.validate import validate_coupling
from raymem.methods.tiny_model import tiny_config
from tests.helpers.loram_families import FAMILIES, config_of


def test_indices_of_a_fused_layer_lie_as_its_rows_do() -> None:
    """Phi-3: rows are all queries, then all keys, then all values; 8 heads of 4, 2 per KV group."""
    attention, mlp = couple(config_of("phi3")).groups
    expected = [*range(8, 16), *range(24, 32), *(32 + i for i in (4, 5, 6, 7, 12, 13, 14, 15))]
    expected += [48 + i for i in (4, 5, 6, 7, 12, 13, 14, 15)]
    assert attention.members[0].indices(torch.tensor([1, 3])).tolist() == expected
    assert mlp.members[0].indices(torch.tensor([0, 47])).tolist() == [0, 47, 48, 95]


def test_sums_per_unit_follow_the_indices() -> None:
    member = Member("any", "out", ((0, 2), (6, 1)))
    values = torch.arange(9.0)
    expected = [values[member.indices(torch.tensor([unit]))].sum().item() for unit in range(3)]
    assert member.per_unit(values, 3).tolist() == expected


def test_names_are_located() -> None:
    found = couple(config_of("opt"))
    assert found.locate("model.decoder.layers.3.fc1.weight") == (3, "fc1.weight")
    assert found.locate("model.decoder.layers_norm.weight") is None
    assert found.locate("lm_head.weight") is None
    assert found.prefix(3) == "model.decoder.layers.3."


@pytest.mark.parametrize("family", FAMILIES)
def test_every_coupling_holds_on_a_clone(family: str) -> None:
    assert validate_coupling(config_of(family)) < 1e-5


def test_a_clone_keeps_what_decides_the_coupling() -> None:
    real = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80
    )
    small = tiny_config(real)
    assert (small.num_attention_heads, small.num_key_value_heads, small.hidden_size) == (32, 4, 512)
    assert small.num_hidden_layers == 3


def test_configs_with_long_rotary_factors_have_clones() -> None:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    real = Phi3Config(rope_parameters=factors, original_max_position_embeddings=4096, pad_token_id=0)
    assert validate_coupling(real) < 1e-5


def _wrong(config: Any, edit: Any) -> tuple[Group, ...]:
    groups = coupling_module._llama_like(config)
    return tuple(dataclasses.replace(g, members=tuple(edit(m) for m in g.members)) for g in groups)


def _query_heads_strided(member: Member) -> Member:
    """LLM-Pruner's mistake: query head h goes with KV head h mod 4 rather than h // 2."""
    return dataclasses.replace(member, segments=((0, 4), (16, 4))) if "q_proj" in member.module else member


def _up_forgotten(member: Member) -> Member:
    return dataclasses.replace(member, module="mlp.gate_proj") if "up_proj" in member.module else member


def _gate_reversed(member: Member) -> Member:
    return dataclasses.replace(member, segments=((1, 1),)) if "up_proj" in member.module else member


@pytest.mark.parametrize("edit", [_query_heads_strided, _up_forgotten, _gate_reversed])
def test_a_wrong_coupling_is_refused(edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = dataclasses.replace(coupling_module.FAMILIES["llama"], groups=lambda config: _wrong(config, edit))
    monkeypatch.setitem(coupling_module.FAMILIES, "llama", family)
    with pytest.raises(ModelError, match="'llama' does not hold for this config"):
        validate_coupling(config_of("llama"))


def test_a_norm_over_all_heads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMo 2 normalises all queries together, which pruning changes: not among the families, and rightly so."""
    options = {**FAMILIES["llama"], "model_type": "olmo2"}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    family = coupling_module._llama_family("olmo2", "Olmo2DecoderLayer")
    monkeypatch.setitem(coupling_module.FAMILIES, "olmo2", family)
    with pytest.raises(ModelError, match="cannot be built or run"):
        validate_coupling(config)

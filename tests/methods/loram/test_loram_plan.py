"""The paper's parameter counts from configs alone, and the rules behind them."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import ceil, floor
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

from raymem.errors import ModelError, RecipeError
from raymem.methods.loram import Plan, PruneOptions, plan_pruning
from raymem.methods.loram.coupling import Group
from raymem.methods.loram.pruning.plan import kept_units

SHAPES = {
    "2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "2-13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "2-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
SHAPES["3.1-70B"] = {**SHAPES["2-70B"], "vocab_size": 128256}
GIB = 2**30


def config(name: str) -> LlamaConfig:
    return LlamaConfig(**{"vocab_size": 32000, **SHAPES[name]}, tie_word_embeddings=False)


@cache
def plan(name: str, ratio: float, **options: Any) -> Plan:
    return plan_pruning(config(name), PruneOptions(ratio=ratio, **options))


@pytest.mark.parametrize(
    ("name", "ratio", "kept", "parameters", "bf16", "paper_4bit", "true", "gib"),
    [
        ("2-13B", 0.65, (14, 4838), 6_005_662_720, 2.17, None, 7.26, 3.34),
        ("2-70B", 0.65, (3, 10035), 28_099_436_544, 2.45, 9.82, 9.03, 14.23),
        ("2-70B", 0.75, (2, 7168), 21_488_738_304, 3.21, 12.84, 11.63, 11.05),
        ("2-70B", 0.85, (2, 4300), 16_272_924_672, 4.24, 16.95, 15.04, 8.54),
        ("2-70B", 0.95, (1, 1433), 9_662_226_432, 7.14, 28.56, 23.93, 5.37),
        ("3.1-70B", 0.85, (2, 4300), 17_849_982_976, 3.95, 15.81, 11.45, 11.48),
    ],
)
def test_the_counts_of_the_paper(
    name: str,
    ratio: float,
    kept: tuple[int, int],
    parameters: int,
    bf16: float,
    paper_4bit: float | None,
    true: float,
    gib: float,
) -> None:
    found = plan(name, ratio)
    layers = SHAPES[name]["num_hidden_layers"]
    assert list(found.counts) == list(range(4, layers - 2)) == found.pruned_layers
    assert all(counts == {"attn": kept[0], "mlp": kept[1]} for counts in found.counts.values())
    assert found.pruned.parameters == found.theoretical_parameters == parameters
    assert round(found.paper_reduction, 2) == round(found.bf16_reduction, 2) == bf16
    assert paper_4bit is None or round(found.paper_nf4_reduction, 2) == paper_4bit
    assert round(found.nf4_reduction, 2) == true
    assert round(found.pruned.nf4_bytes / GIB, 2) == gib


def test_the_count_is_the_papers_formula() -> None:
    """Section 1 in straight lines: 2hq + 2hkv + 3h*mlp + 2h a layer, both embeddings, the last norm."""
    shape, ratio = SHAPES["2-70B"], Fraction(17, 20)
    hidden, head_dim, vocabulary = 8192, 128, 32000
    total = 2 * vocabulary * hidden + hidden
    for layer in range(80):
        kv, neurons = 8, shape["intermediate_size"]
        if 4 <= layer < 78:
            kv, neurons = 8 - floor(8 * ratio), neurons - ceil(neurons * ratio)
        total += 2 * hidden * 8 * kv * head_dim + 2 * hidden * kv * head_dim + 3 * hidden * neurons + 2 * hidden
    assert plan("2-70B", 0.85).pruned.parameters == total


def test_dense_models_and_the_papers_4bit_sizes() -> None:
    sizes = {name: plan(name, 0.85).full.parameters for name in SHAPES}
    assert round(sizes["2-13B"] / sizes["2-7B"], 2) == 1.93
    assert round(sizes["2-70B"] / sizes["2-13B"], 2) == 5.30
    assert round(sizes["3.1-70B"] / sizes["3.1-8B"], 2) == 8.79
    # The papers count every parameter as 4 bits and leave the scales out.
    assert round(plan("2-70B", 0.85).pruned.parameters / 2 / GIB, 2) == 7.58
    assert round(plan("3.1-70B", 0.85).pruned.parameters / 2 / GIB, 2) == 8.31
    unpruned = plan("2-70B", 0.85).full
    assert round(unpruned.nf4_bytes / GIB, 1) == 33.9
    assert round(unpruned.bf16_bytes / unpruned.nf4_bytes, 2) == 3.79


def test_zeros_in_dense_weights_are_counted_as_the_paper_does_and_save_nothing() -> None:
    everywhere = {"keep_first": 0, "keep_last": 0, "criterion": "sparsegpt"}
    semi = plan("2-13B", 0.5, structure="4:8", **everywhere)
    assert semi.theoretical_parameters == 6_671_979_520
    assert round(semi.paper_reduction, 2) == 1.95
    unstructured = plan("2-13B", 0.55, structure="unstructured", **everywhere)
    full, linears = unstructured.full.parameters, 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    assert abs(unstructured.theoretical_parameters - (full - Fraction(11, 20) * linears)) < 40
    assert round(unstructured.paper_reduction, 2) == 2.16
    for found in (semi, unstructured):
        assert not found.saves_memory
        assert found.pruned == found.full
        assert found.bf16_reduction == 1


@pytest.mark.parametrize(
    ("num_units", "rounds_up", "ratio", "kept"),
    [(8, True, "0.9", 1), (40, False, "0.9", 4), (8, True, "0.75", 2), (8, True, "0.85", 2), (40, False, "0.65", 14)],
)
def test_fractions_where_floats_are_one_off(num_units: int, rounds_up: bool, ratio: str, kept: int) -> None:
    assert kept_units(Group("attn", num_units, (), rounds_up), Fraction(ratio), 1, 0) == kept


def test_ratio_zero_prunes_nothing() -> None:
    found = plan("3.1-8B", 0.0)
    assert found.counts == {}
    assert found.pruned == found.full


def test_every_layer_may_have_its_own_ratio() -> None:
    ratios = tuple(layer / 40 for layer in range(32))
    counts = plan("3.1-8B", 0.0, layer_ratios=ratios).counts
    assert 0 not in counts and counts[20] == {"attn": 4, "mlp": 7168} and counts[31] == {"attn": 2, "mlp": 3225}


def test_neurons_round_down_to_a_multiple() -> None:
    assert plan("2-70B", 0.85, round_to=128).counts[4] == {"attn": 2, "mlp": 4224}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, r"ratio: 1.0 is outside \[0, 1\)"),
        ({"ratio": -0.1}, r"ratio: -0.1 is outside"),
        ({"ratio": float("nan")}, "ratio: nan is outside"),
        ({"layer_ratios": (0.5, 2.0)}, r"layer_ratios\[1\]: 2.0 is outside"),
        ({"structure": "2:4", "criterion": "wanda", "ratio": 0.25}, "ratio: 0.25 contradicts structure: 2:4"),
        ({"structure": "4:8"}, "criterion: random cannot choose what goes under structure: 4:8"),
        ({"criterion": "sparsegpt"}, "criterion: sparsegpt cannot choose what goes under structure: units"),
        ({"criterion": "size"}, "criterion: 'size' is unknown"),
        ({"keep_first": -1}, "keep_first: -1 is too small"),
        ({"round_to": 0}, "round_to: 0 is too small"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        PruneOptions(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.98}, "leaves none of the 40 heads of layer 4; it is at most 0.975"),
        (
            {"ratio": 0.9, "round_to": 2048},
            "13824 neurons of layer 4 with round_to: 2048; it is at most 0.851",
        ),
        ({"ratio": 0.5, "round_to": 1 << 14}, "layer 4 with round_to: 16384; lower round_to"),
        ({"keep_first": 30, "keep_last": 10}, "leave none of the 40 layers to prune"),
        ({"layer_ratios": (0.5,)}, "layer_ratios: 1 values for a model of 40 layers"),
    ],
)
def test_options_that_do_not_fit_the_model(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        plan_pruning(config("2-13B"), PruneOptions(**options))


def test_unknown_architectures_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="model_type 'qwen3_moe' are coupled; it prunes llama, mistral"):
        plan_pruning(Qwen3MoeConfig(), PruneOptions())

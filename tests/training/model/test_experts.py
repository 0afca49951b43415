"""Experts in 4 bits compute what those of transformers do with the same weights, and LoRA on them what PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raymem.errors import ModelError
from raymem.memory.meter import storage_bytes
from raymem.training.model import experts
from raymem.training.model.build import build_model
from tests.helpers import families
from tests.helpers.support import column, make_recipe, random_batch, run_fragment, save_tokenizer, train

EXACT: dict[str, Any] = {"train": {"precision": "fp32"}, "data": {"packing": "none"}}
NF4: dict[str, Any] = {"base": {"quantize": "nf4"}, **EXACT}
ON_EXPERTS: dict[str, Any] = {"adapter": {"targets": ["q_proj", "experts.gate_up_proj", "experts.down_proj"]}}
SLOW = (
    "mixtral", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "afmoe",
    "minimax_m2", "phimoe", "jamba", "qwen3_next",
)  # fmt: skip
TOKENS, HIDDEN = 13, 32


def build(base: Path, *fragments: dict[str, Any]) -> Any:
    return build_model(make_recipe(*fragments, model=base))


def experts_of(model: Any) -> list[Any]:
    """The modules of routed experts, below whatever wraps them."""
    return [module for module in model.modules() if "gate_up_proj" in module._parameters]


def take_weights(exact: Any, quantised: Any) -> None:
    """Give one model the weights of experts that another has in 4 bits."""
    for module, packed in zip(experts_of(exact), experts_of(quantised), strict=True):
        for leaf, packing in packed.packings.items():
            module._parameters[leaf].data = packing.dequantise(packed._parameters[leaf])


def pass_through(module: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The output for random tokens, experts and shares, and the gradient of the tokens for a random one of that."""
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=source).requires_grad_()
    index = torch.rand(TOKENS, count - 1, generator=source).topk(2).indices  # nobody chooses the last
    output = module(hidden, index, torch.rand(TOKENS, 2, generator=source))
    output.backward(torch.randn(TOKENS, HIDDEN, generator=source))
    assert hidden.grad is not None
    return output.detach(), hidden.grad


@pytest.mark.parametrize("family", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_packed_experts_compute_what_dense_ones_do(family: str, tmp_path: Path) -> None:
    """gpt_oss has weights the other way round, biases, and its gate and up projection interleaved."""
    pytest.importorskip("bitsandbytes")
    base = families.save(tmp_path / "model", family)
    quantised, exact = build(base, NF4), build(base, EXACT)
    originals = [module.down_proj.data for module in experts_of(exact)]
    take_weights(exact, quantised)
    for ours, theirs, original in zip(experts_of(quantised), experts_of(exact), originals, strict=True):
        error = (theirs.down_proj - original).norm() / original.norm()
        assert 0.02 < error < 0.15, "the checkpoint's own weights, in 4 bits"
        for found, expected in zip(*(pass_through(m, theirs.num_experts) for m in (ours, theirs)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            assert found.abs().max() > 1e-4


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_lora_on_packed_experts_is_that_of_peft(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = families.save(tmp_path / "model", family)
    models = [build(base, fragment, ON_EXPERTS) for fragment in (NF4, EXACT)]
    take_weights(models[1], models[0])
    name = next(name for name, _ in models[0].named_modules() if name.endswith(".mlp.experts"))
    results, most_kept = [], []
    for model in models:
        wrapper = model.get_submodule(name)
        source = torch.Generator().manual_seed(1)
        factors = {n: p for n, p in wrapper.named_parameters() if p.requires_grad}
        for factor in factors.values():
            factor.data = 0.1 * torch.randn(factor.shape, generator=source)
        kept: list[int] = []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            adapted = pass_through(wrapper, wrapper.num_experts)
        most_kept.append(max(kept))
        with model.disable_adapter():
            plain, _ = pass_through(wrapper, wrapper.num_experts)
        assert (adapted[0] - plain).norm() > 0.1 * plain.norm()
        results.append([*adapted, plain, *(factor.grad for factor in factors.values())])
    assert len(results[0]) == 3 + 4, "A and B of either projection"
    one_projection = experts_of(models[1])[0].down_proj.numel()
    assert most_kept[0] < one_projection <= most_kept[1], "PEFT keeps a dense copy of all experts for backward"
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama4_text", {}, r"no way to hold the experts of Llama4TextExperts in 4 bits \(model.layers.0.feed_forward"
                            r".experts: gate_up_proj \[4, 32, 128\].*Set base.quantize: none"),
        ("qwen3_moe", {"moe_intermediate_size": 7}, r"a multiple of 64 weights each, but not those of "
                                                    r"model.layers.0.mlp.experts \(gate_up_proj \[4, 14, 32\]"),
    ],
)  # fmt: skip
def test_an_unknown_layout_is_refused_by_name(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    families.config_of(family, **changes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        build_model(make_recipe(NF4, model=tmp_path), meta=True, planned=True)


class FoldedExperts(nn.Module):
    """All experts below each other in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(4 * 8, 16))


def test_experts_folded_into_a_matrix_are_refused_too() -> None:
    with pytest.raises(ModelError, match=r"the experts of FoldedExperts in 4 bits \(1: w1 \[32, 16\]\)"):
        experts.check(nn.Sequential(nn.Linear(4, 4), FoldedExperts()))


def test_experts_hold_a_quarter_of_their_bf16_bytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = families.save(tmp_path / "model", "qwen3_moe", hidden_size=128, moe_intermediate_size=128)
    bf16 = {"train": {"precision": "bf16"}}
    whole, quantised = (
        storage_bytes(parameter for module in experts_of(model) for parameter in module._parameters.values())
        for model in (build(base, EXACT, bf16), build(base, NF4, bf16))
    )
    assert 0.25 * whole < quantised < 0.27 * whole


@pytest.mark.slow
def test_a_run_with_adapted_experts_can_be_evaluated(examples: Path, tmp_path: Path) -> None:
    """Also by PEFT and transformers alone: its adapter is a standard one."""
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = families.save(tmp_path / "model", "mixtral")
    save_tokenizer(base)
    recipe = make_recipe(NF4, ON_EXPERTS, run_fragment(examples, tmp_path), {"train": {"steps": 20}}, model=base)
    outcome, rows = train(recipe)
    assert outcome is not None
    assert column(rows)[-1] < column(rows)[0] - 0.1
    inputs = {"input_ids": random_batch(2, 12, packed=False).input_ids}
    again = build_model(recipe, adapter_at=Path(outcome.artifact)).eval()
    with torch.no_grad():
        found = again(**inputs).logits
        exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        plain = exact(**inputs).logits
        expected = PeftModel.from_pretrained(exact, outcome.artifact)(**inputs).logits
    assert (found - expected).norm() < 0.3 * (expected - plain).norm()

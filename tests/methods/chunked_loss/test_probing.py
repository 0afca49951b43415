"""Which way is right is tried out: on architectures whose heads do more than multiply, and on ones that fool it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from raymem.methods.chunked_loss import choose, probe
from raymem.methods.chunked_loss.choice import verdict_of
from raymem.methods.tiny_model import random_clone
from tests.helpers.support import FAMILIES

BOTH = {"llama", "llama_tied", "qwen3", "gemma3_text", "gpt_neox", "gpt2", "opt", "phi3", "qwen3_moe"}
MORE: dict[str, tuple[dict[str, Any], bool]] = {
    "qwen2": ({}, True),
    "mixtral": ({}, True),
    "gpt_oss": ({}, True),
    "gemma2": ({}, False),  # soft-capping
    "cohere": ({}, False),  # scaling
    "granite": ({"logits_scaling": 8.0}, False),
    "granite plain": ({"logits_scaling": 1.0}, True),
    "phi": ({}, False),  # bias
}


def config_of(name: str, **options: Any) -> Any:
    return AutoConfig.for_model(name.split()[0], **options)


@pytest.mark.parametrize("family", sorted(BOTH))
def test_both_ways_are_right_where_the_head_is_a_product(family: str) -> None:
    options = dict(FAMILIES[family])
    found = probe(config_of(options.pop("model_type"), **options))
    assert (found.product, found.replay) == (True, True), found.reason


@pytest.mark.parametrize("name", MORE)
def test_what_follows_the_head_is_found(name: str) -> None:
    options, product = MORE[name]
    found = probe(config_of(name, **options))
    assert (found.product, found.replay) == (product, True), found.reason


class LooksAtItsNeighbour(LlamaForCausalLM):
    """Its logits depend on those of the position before, so that no chunk can be right."""

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.1 * output.logits.roll(1, dims=1)
        return output


class ScalesByLength(LlamaForCausalLM):
    """Its logits depend on how many positions there are."""

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * (1 + output.logits.shape[1] / 100)
        return output


@pytest.mark.parametrize("odd", [LooksAtItsNeighbour, ScalesByLength])
def test_an_odd_forward_is_found(odd: type, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda config, **options: odd(config))
    found = probe(config_of("llama"))
    assert not found.product and not found.replay
    assert found.reason is not None and "differ" in found.reason


def test_a_clone_that_cannot_be_built_proves_nothing() -> None:
    found = probe(AutoConfig.for_model("t5"))
    assert not found.product and not found.replay
    assert found.reason is not None and "a small clone of it cannot be run" in found.reason


def test_the_clone_keeps_every_scalar_and_draws_the_same_weights() -> None:
    config = config_of("gemma2", final_logit_softcapping=7.0)
    one, other = random_clone(config), random_clone(config)
    assert one.config.final_logit_softcapping == 7.0
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert sum(p.numel() for p in one.parameters()) < 1_000_000


def test_it_is_asked_once_per_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from raymem import cache
    from raymem.methods.chunked_loss import choice

    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_answers", {})
    model = random_clone(config_of("llama", rms_norm_eps=3e-5))
    first = verdict_of(model)
    (file,) = (tmp_path / "probes").iterdir()
    monkeypatch.setattr(cache, "_answers", {})
    monkeypatch.setattr(choice, "probe", lambda config, kind: pytest.fail("asked again"))
    assert verdict_of(model) == first
    file.write_text("{")  # half a file is as good as none
    monkeypatch.setattr(cache, "_answers", {})
    monkeypatch.setattr(choice, "probe", probe)
    assert verdict_of(model) == first


def test_the_head_that_is_there_decides() -> None:
    model = random_clone(config_of("llama"))
    assert choose(model).chunked and not choose(model).replay
    model.lm_head.register_forward_hook(lambda module, given, output: output)
    assert choose(model).chunked and choose(model).replay

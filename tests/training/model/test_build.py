"""Building a model: what it computes at the start, in which dtypes, and what is said when it cannot be built."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raymem.errors import ModelError
from raymem.memory.meter import resident_tensors, storage_bytes
from raymem.training.model.build import build_model, load_config, tokenizer_path
from raymem.training.optim import build_updater
from raymem.training.step import train_step
from tests.helpers.support import (
    FAMILIES,
    assert_same,
    frozen,
    make_recipe,
    num_targets,
    random_batch,
    save_model,
    snapshot,
)

FULL: dict[str, Any] = {"adapter": {"kind": "none"}}
UNPACKED = {"data": {"packing": "none"}}  # not every family keeps packed examples apart


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**random_batch(2, 12, packed=False).model_inputs()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_alone_is_trained(family: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", family)
    plain, adapted = (build_model(make_recipe(*parts, UNPACKED, model=directory)) for parts in ([FULL], []))
    assert torch.equal(logits(adapted), logits(plain))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_an_adapter_of_the_same_seed_is_the_same_whatever_ran_before(llama: Path) -> None:
    def factors(seed: int) -> torch.Tensor:
        torch.randn(7)
        model = build_model(make_recipe({"seed": seed}, model=llama))
        return torch.cat([p.flatten() for name, p in model.named_parameters() if ".lora_A." in name])

    assert torch.equal(factors(0), factors(0))
    assert not torch.equal(factors(0), factors(1))


@pytest.mark.parametrize(
    ("fragment", "base", "trained"),
    [
        ({}, torch.float32, torch.float32),
        ({"train": {"precision": "bf16"}}, torch.bfloat16, torch.bfloat16),
        ({"train": {"precision": "bf16_mixed"}}, torch.float32, torch.float32),
        ({"train": {"precision": "bf16_mixed"}, "model": {"dtype": "bf16"}}, torch.bfloat16, torch.float32),
    ],
    ids=["fp32", "bf16", "mixed", "mixed on bf16"],
)
def test_dtypes_follow_the_precision(llama: Path, fragment: Any, base: torch.dtype, trained: torch.dtype) -> None:
    for meta in (False, True):
        model = build_model(make_recipe(fragment, model=llama), meta=meta)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {base}


def test_a_meta_model_allocates_nothing(llama: Path) -> None:
    model = build_model(make_recipe(model=llama), meta=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.training


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize(
    "adapter", [{"kind": "none", "freeze": ["lm_head"]}, {"kind": "lora", "targets": ["lm_head", "q_proj"]}]
)
def test_a_tied_head_is_one_parameter_with_the_embedding(tmp_path: Path, adapter: Any, meta: bool) -> None:
    """Before anything is frozen, wrapped or sharded, so that all of these mean both of its places."""
    model: Any = build_model(make_recipe({"adapter": adapter}, model=save_model(tmp_path, "llama_tied")), meta=meta)
    base = model.get_base_model() if adapter["kind"] == "lora" else model
    head = getattr(base.lm_head, "base_layer", base.lm_head)
    assert head.weight is base.model.embed_tokens.weight and not head.weight.requires_grad
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_random_weights_repeat_by_seed_and_leave_the_global_stream_alone(llama: Path) -> None:
    section = {"name": None, "config": FAMILIES["llama_tied"], "tokenizer": str(llama)}

    def build(seed: int) -> Any:
        return build_model(make_recipe(FULL, {"model": section, "seed": seed}))

    before = torch.random.get_rng_state()
    first, again, other = build(0), build(0), build(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    assert first.lm_head.weight is first.model.embed_tokens.weight
    scale = first.model.layers[0].mlp.up_proj.weight.std().item()
    assert scale == pytest.approx(first.config.initializer_range, rel=0.2), "transformers' own rule"


def test_checkpointing_changes_neither_loss_nor_gradients(llama: Path) -> None:
    found = []
    for activations in ("none", "checkpoint"):
        model = build_model(make_recipe(FULL, {"activations": activations}, model=llama))
        output = model(**random_batch(2, 12).model_inputs()).logits
        output.square().mean().backward()
        found.append((output, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_the_attention_is_the_one_asked_for(llama: Path, kind: str) -> None:
    model: Any = build_model(make_recipe(FULL, {"model": {"attention": kind}}, model=llama))
    assert model.config._attn_implementation == kind


def refusal(*fragments: dict[str, Any], model: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        build_model(make_recipe(*fragments, model=model), meta=True)
    return str(caught.value)


def test_what_is_no_model_is_refused_without_a_network(llama: Path, tmp_path: Path) -> None:
    assert f"model.name: {tmp_path}/absent does not exist" in refusal(model=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json; give a directory" in refusal(model=tmp_path / "empty")
    message = refusal(model="nobody/no-such-model")
    assert "'nobody/no-such-model' is no local directory" in message and "HF_TOKEN" in message
    shutil.copytree(llama, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{")
    assert "damaged/config.json cannot be used" in refusal(model=tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": "lama"}')
    assert "damaged/config.json cannot be used" in refusal(model=tmp_path / "damaged")


def test_an_unknown_model_type_names_near_ones() -> None:
    section = {"name": None, "config": {"model_type": "lama"}, "tokenizer": "demo"}
    with pytest.raises(ModelError, match=r"model\.config\.model_type: 'lama' is unknown .*near names: .*llama"):
        load_config(make_recipe({"model": section}))


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 3}, {"hidden_act": "no_such"}, {"hidden_size": "wide"}], ids=str
)
def test_a_config_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    section = {"name": None, "config": {**FAMILIES["llama"], **change}, "tokenizer": "demo"}
    with pytest.raises(ModelError, match=r"^model.*(hidden.size|no_such)"):
        build_model(make_recipe({"model": section}), meta=True)


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert refusal(model=tmp_path).startswith("model")


def test_the_tokenizer_is_the_models_own_unless_named(llama: Path) -> None:
    assert tokenizer_path(make_recipe(model=llama)) == str(llama)
    assert tokenizer_path(make_recipe({"model": {"tokenizer": "demo"}}, model=llama)) == "demo"


BF16 = {"train": {"precision": "bf16"}}
NF4 = {"base": {"quantize": "nf4"}, **BF16}


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for its linear layers to outweigh embeddings and norms."""
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return save_model(tmp_path_factory.mktemp("wider") / "model", **shape)


def test_nf4_stores_four_bits_and_computes_nearly_the_same(wider: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = build_model(make_recipe(NF4, model=wider))
    exact = build_model(make_recipe(BF16, model=wider))
    packed = {name: p for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 2 * 7, "every linear layer of both blocks, not the head"
    weights = sum(p.numel() for name, p in exact.named_parameters() if name in packed)
    assert 2 * sum(p.numel() for p in packed.values()) == weights
    others = storage_bytes(p for name, p in model.named_parameters() if name not in packed)
    bits_per_weight = 8 * (storage_bytes(resident_tensors(model)) - others) / weights
    assert 4.0 < bits_per_weight < 4.7, "with the scales of the scales"
    alike = nn.functional.cosine_similarity(logits(model).float().flatten(), logits(exact).float().flatten(), dim=0)
    assert 0.98 < alike < 1


def test_nf4_multiplies_by_the_weights_of_gpt2_the_right_way_round(tmp_path: Path) -> None:
    """Its files hold them transposed; of a square one bitsandbytes would not notice."""
    pytest.importorskip("bitsandbytes")
    gpt2 = save_model(tmp_path / "model", "gpt2")
    packed, exact = build_model(make_recipe(NF4, model=gpt2)), build_model(make_recipe(BF16, model=gpt2))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for leaf in ("attn.c_proj", "attn.c_attn"):
        layers: list[Any] = [
            model.get_submodule(f"base_model.model.transformer.h.0.{leaf}") for model in (packed, exact)
        ]
        found, expected = (layer.get_base_layer()(x).float() for layer in layers)
        assert (found - expected).norm() < 0.15 * expected.norm()


def test_nf4_trains_an_adapter_also_after_an_evaluation(wider: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = make_recipe(NF4, model=wider)
    model = build_model(recipe)
    updater = build_updater(model, recipe)
    before, batch = snapshot(frozen(model)), random_batch(2, 12)
    for step in range(2):
        logits(model)
        model.train()
        weights = snapshot(updater.parameters)
        result = train_step(model, [batch], num_targets(batch), updater, step, 1e-2)
        assert torch.isfinite(result.loss)
        still = [name for name, value in updater.parameters.items() if torch.equal(value, weights[name])]
        assert all(".lora_A." in name for name in still) if step == 0 else not still, "A moves once B is not zero"
    assert_same(frozen(model), before)


def test_nf4_without_bitsandbytes_says_what_to_install(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "pip install 'raymem[quant]'" in refusal(NF4, model=llama)

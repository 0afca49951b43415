"""At full rank nothing changes: gradients are exact, whatever the architecture, the scope and what surrounds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from raymem.methods.layers.checkpointing import checkpoint_layers, keep_layers
from raymem.methods.loract import compress_activations
from tests.helpers.loract_families import WIDTH, batch, build, difference, gradients, lora

pytestmark = pytest.mark.numerics

SCOPES = ("layer", "sublayer", "linear")
FULL: dict[str, Any] = {"rank": WIDTH, "first_input": "compressed"}
EXACT = 5e-6


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "bert", "vit", "gemma3_text", "gpt2", "t5"])
def test_full_rank_gives_exact_gradients_and_the_loss_is_untouched(family: str, scope: str) -> None:
    model, inputs = build(family), batch(family)
    expected_loss, expected = gradients(model, inputs)
    state_after = torch.get_rng_state()
    with compress_activations(model, scope=scope, **FULL) as handle:
        loss, found = gradients(model, inputs)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(torch.get_rng_state(), state_after), "the global random stream is not touched"
    assert difference(found, expected) < EXACT
    assert handle.report.compressed >= 3
    assert torch.equal(gradients(model, inputs)[1][next(iter(expected))], next(iter(expected.values())))


@pytest.mark.parametrize("scope", SCOPES)
def test_low_rank_does_compress_and_more_rank_comes_closer(scope: str) -> None:
    model, inputs = build("llama"), batch()
    loss, exact = gradients(model, inputs)
    errors = []
    for rank in (2, 8, 24):
        with compress_activations(model, rank=rank, scope=scope, first_input="compressed"):
            found_loss, found = gradients(model, inputs)
        assert torch.equal(found_loss, loss)
        errors.append(difference(found, exact))
    assert errors[0] > errors[1] > errors[2] > 100 * EXACT


@pytest.mark.parametrize("scope", ["layer", "sublayer"])
def test_experts_are_routed_as_in_the_forward_pass(scope: str) -> None:
    model, inputs = build("qwen3_moe"), batch()
    _, exact = gradients(model, inputs)
    with compress_activations(model, rank=2, scope=scope, first_input="compressed") as handle:
        _, found = gradients(model, inputs)
    assert handle.report.raw["moe"] == 3
    if scope == "layer":
        assert difference(found, exact) < EXACT, "every layer routes, so every input is kept"
    else:
        assert handle.report.compressed == 3, "attention inputs are compressed all the same"


@pytest.mark.parametrize("scope", SCOPES)
def test_lora_layers(scope: str) -> None:
    model, inputs = lora(build("llama"), lora_dropout=0.1), batch()
    loss, exact = gradients(model, inputs)
    with compress_activations(model, scope=scope, **FULL):
        found_loss, found = gradients(model, inputs)
    assert torch.equal(found_loss, loss)
    assert difference(found, exact) < EXACT


@pytest.mark.parametrize("scope", SCOPES)
def test_autocast_and_bf16(scope: str) -> None:
    inputs = batch()
    for model, mixed in ((build("llama"), True), (build("llama").bfloat16(), False)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss, exact = gradients(model, inputs)
            with compress_activations(model, scope=scope, **FULL):
                found_loss, found = gradients(model, inputs)
        assert torch.equal(found_loss, loss)
        assert difference(found, exact) < 0.03, "the rounding of bf16 factors"
        assert all(value.dtype == exact[name].dtype for name, value in found.items())


@pytest.mark.parametrize("scope", SCOPES)
def test_plain_pytorch_layers(scope: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 3).train()
    x = torch.randn(4, 24, WIDTH)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, exact = run()
    with compress_activations(model, scope=scope, **FULL) as handle:
        found_loss, found = run()
    assert torch.equal(found_loss, loss)
    assert difference(found, exact) < EXACT
    assert handle.report.compressed >= 3


def test_layers_can_be_named_or_handed_over() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())})["blocks"])
    x = torch.randn(64, WIDTH)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(x).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    exact = run()
    blocks: Any = model[1]
    for layers in (r"1\.\d", nn.ModuleList(blocks)):
        with compress_activations(model, layers=layers, rank=WIDTH) as handle:
            assert difference(run(), exact) < EXACT
        assert (handle.report.compressed, dict(handle.report.raw)) == (1, {"first": 1})


@pytest.mark.parametrize("scope", ["layer", "sublayer"])
def test_the_checkpointing_switch_of_transformers_changes_nothing(scope: str) -> None:
    model, inputs = build("llama"), batch()
    _, exact = gradients(model, inputs)
    switch: Any = model
    reports = []
    for first in (True, False):
        if first:
            checkpoint_layers(switch)
        with compress_activations(model, scope=scope, **FULL) as handle:
            if not first:
                checkpoint_layers(switch)
            assert difference(gradients(model, inputs)[1], exact) < EXACT
        keep_layers(switch)
        reports.append((handle.report.compressed, handle.report.shared))
    assert reports[0] == reports[1]
    assert reports[0][0] == {"layer": 3, "sublayer": 6}[scope]


def test_a_4_bit_base() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = build("llama")
    for block in model.model.layers:  # type: ignore[union-attr]
        for parent, name in ((block.mlp, "gate_proj"), (block.mlp, "down_proj"), (block.self_attn, "q_proj")):
            old = getattr(parent, name)
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.detach(), requires_grad=False, quant_type="nf4")
            setattr(parent, name, new.to("cpu"))
    model, inputs = lora(model), batch()
    loss, exact = gradients(model, inputs)
    for scope in SCOPES:
        with compress_activations(model, scope=scope, **FULL):
            found_loss, found = gradients(model, inputs)
        assert torch.equal(found_loss, loss)
        assert difference(found, exact) < EXACT

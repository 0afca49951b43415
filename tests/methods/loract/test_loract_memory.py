"""Bytes that a forward pass keeps, against the same model without LoRAct and with transformers' checkpointing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from raymem.memory.meter import PeakMeter, resident_tensors
from raymem.methods.layers.checkpointing import checkpoint_layers, keep_layers
from raymem.methods.loract import compress_activations
from raymem.testing import heap_in_use_bytes
from tests.helpers.loract_families import batch, build

LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8,
         "head_dim": 64, "num_hidden_layers": 4, "max_position_embeddings": 512, "attention_dropout": 0.0}  # fmt: skip
SMALL = {**LARGE, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 4,
         "head_dim": 32}  # fmt: skip


def lora_stack(rank: int, **shape: Any) -> nn.Module:
    """The decoder stack of a Llama with LoRA on every linear layer."""
    from peft import LoraConfig, get_peft_model

    inner: Any = build("llama", **shape)
    return get_peft_model(inner.model, LoraConfig(r=rank, target_modules="all-linear")).train()


def forward(stack: nn.Module, rows: int) -> torch.Tensor:
    ids = torch.arange(rows * 512).view(rows, 512) % 64
    output: torch.Tensor = stack(input_ids=ids, use_cache=False).last_hidden_state
    return output


def kept_bytes(stack: nn.Module) -> int:
    """In-use memory after a forward pass of 4 x 512 tokens, but for its output."""
    gc.collect()
    before = heap_in_use_bytes()
    output = forward(stack, 4)
    gc.collect()
    return heap_in_use_bytes() - before - output.numel() * output.element_size()


def of_plain_and_checkpointing(stack: nn.Module) -> tuple[int, int]:
    """Kept bytes of plain LoRA and of transformers' checkpointing."""
    kept_bytes(stack)  # what a first pass leaves behind for ever
    nothing = kept_bytes(stack)
    switch: Any = stack
    checkpoint_layers(switch.base_model.model)
    checkpointed = kept_bytes(stack)
    keep_layers(switch.base_model.model)
    switch.base_model.model.disable_input_require_grads()  # which the line before forgets
    return nothing, checkpointed


@pytest.fixture(scope="module")
def large() -> tuple[nn.Module, int, int]:
    stack = lora_stack(16, **LARGE)
    return stack, *of_plain_and_checkpointing(stack)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return lora_stack(4, **SMALL)


@pytest.mark.parametrize(
    ("scope", "first_input", "of_plain", "of_checkpointing"),
    [
        ("layer", "raw", 0.04, 0.55),
        ("sublayer", "raw", 0.05, 0.70),
        ("layer", "compressed", 0.03, 0.40),
        ("sublayer", "compressed", 0.05, 0.55),
        ("linear", "raw", 0.32, 4.7),
    ],
)
def test_saved_bytes_of_4_layers(
    large: tuple[nn.Module, int, int], scope: str, first_input: str, of_plain: float, of_checkpointing: float
) -> None:
    stack, plain, checkpointing = large
    with compress_activations(stack, rank=0.125, scope=scope, first_input=first_input):
        kept = kept_bytes(stack)
    assert kept <= of_plain * plain
    assert kept <= of_checkpointing * checkpointing


@pytest.mark.slow
def test_saved_bytes_of_16_layers() -> None:
    stack = lora_stack(16, **{**LARGE, "num_hidden_layers": 16})
    plain, checkpointing = of_plain_and_checkpointing(stack)
    with compress_activations(stack, rank=0.125):
        kept = kept_bytes(stack)
    assert kept <= 0.02 * plain
    assert kept <= 0.30 * checkpointing


def test_the_report_counts_the_bytes_that_are_held(small: nn.Module) -> None:
    rows, width, rank, depth = 512, 128, 16, 4
    with compress_activations(small, rank=rank) as handle:
        forward(small, 1)
    one, factors = rows * width * 4, rank * (rows + width) * 4
    assert handle.report.full_bytes == depth * one
    assert handle.report.held_bytes == one + (depth - 1) * factors


def test_the_peak_of_the_step_falls_too(small: nn.Module) -> None:
    def peak() -> int:
        with PeakMeter(torch.device("cpu"), lambda: resident_tensors(small)) as meter:
            forward(small, 1).sum().backward()
        small.zero_grad()
        assert meter.peak is not None
        return meter.peak.allocated_bytes - sum(p.numel() * 4 for p in small.parameters())

    plain = peak()
    for scope in ("layer", "sublayer"):
        with compress_activations(small, scope=scope):
            assert peak() < 0.5 * plain


def test_one_compression_serves_all_that_save_the_same_tensor(small: nn.Module) -> None:
    with compress_activations(small, scope="linear", first_input="compressed") as handle:
        forward(small, 1).sum().backward()
    # Per layer: two norm outputs, gate, up and the input of the output projection.
    assert handle.report.compressed == 4 * 5
    assert handle.report.shared >= 4 * 6 - 1, "q, k, v, gate, up and down; the first norm itself gets no gradient"


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Weak references to everything that is made in the place of a tensor."""
    from raymem.methods.layers.saved import Factors
    from raymem.methods.loract import packer

    made: list[weakref.ref[Any]] = []

    monkeypatch.setattr(packer, "Factors", type("Factors", (Factors,), {"__init__": _tracked(made)}))
    return made


def _tracked(made: list[weakref.ref[Any]]) -> Any:
    from raymem.methods.layers.saved import Factors

    def init(self: Any, *args: Any) -> None:
        Factors.__init__(self, *args)
        made.append(weakref.ref(self))

    return init


@pytest.mark.parametrize("scope", ["layer", "sublayer", "linear"])
def test_nothing_outlives_its_backward_pass(scope: str, factors: list[weakref.ref[Any]]) -> None:
    model = build("llama")
    inputs = batch(rows=2, length=16)
    gc.disable()  # what only the collector of cycles would find is a leak while a step runs
    try:
        with compress_activations(model, rank=4, scope=scope) as handle:
            sizes = []
            for step in range(12):
                loss = model(**inputs).loss
                if step != 5:  # a forward pass without a backward pass leaves nothing either
                    loss.backward()
                del loss
                assert factors and not any(ref() for ref in factors)
                sizes.append(len(handle._packer._known))
            assert set(sizes) == {0}
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["layer", "sublayer", "linear"])
def test_memory_is_flat_over_500_steps(scope: str) -> None:
    model = build("llama")
    inputs = batch(rows=2, length=16)
    used = []
    with compress_activations(model, rank=4, scope=scope):
        for step in range(500):
            model(**inputs).loss.backward()
            model.zero_grad()
            if step % 100 == 99:
                gc.collect()
                used.append(heap_in_use_bytes())
    assert used[-1] - used[0] < 64 * 1024

"""What MoRAM holds and what it needs for a moment, in bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from raymem.memory.meter import PeakMeter
from raymem.methods.moram import select_indices
from raymem.methods.moram.base import BaseWeight
from raymem.methods.moram.ops import moram_linear, selected_delta
from raymem.testing import heap_in_use_bytes
from tests.helpers.moram_cases import random_case, small_llama, token_batches, with_moram

OUTPUTS, INPUTS, TOKENS = 1408, 1024, 256


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most that is allocated at once inside ``work``, results included."""
    with PeakMeter(torch.device("cpu"), lambda: []) as meter:
        work()
    assert meter.peak is not None
    return meter.peak.allocated_bytes


def transients(formulation: Any, k: int, dtype: torch.dtype, factor_dtype: torch.dtype) -> tuple[int, int]:
    """Bytes beyond results: of a forward pass (beyond y), and of a backward pass (beyond the gradients)."""
    case = random_case(OUTPUTS, INPUTS, k, rank=8, tokens=(TOKENS,), bias=False, dtype=dtype, factor_dtype=factor_dtype)
    kept: list[torch.Tensor] = []

    def forward() -> None:
        kept.append(
            moram_linear(
                case.x, case.index_OK, case.factor_A_RI, case.factor_B_OR, scale=1.0,
                base=BaseWeight(case.weight_OI), formulation=formulation,
            )
        )  # fmt: skip

    forward()
    kept.pop().backward(case.grad_y)  # libraries allocate on their first use
    case.x.grad = case.factor_A_RI.grad = case.factor_B_OR.grad = None
    in_forward = peak_bytes(forward) - kept[0].nbytes
    in_backward = peak_bytes(lambda: kept[0].backward(case.grad_y))
    assert case.x.grad is not None and case.factor_A_RI.grad is not None and case.factor_B_OR.grad is not None
    return in_forward, in_backward - case.x.grad.nbytes - case.factor_A_RI.grad.nbytes - case.factor_B_OR.grad.nbytes


@pytest.mark.parametrize("k", [pytest.param(4, marks=pytest.mark.slow), 16, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
def test_frugal_needs_a_third_of_a_weight_for_a_moment(k: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    weight_bytes = OUTPUTS * INPUTS * dtypes[0].itemsize
    assert max(transients("frugal", k, *dtypes)) <= 0.3 * weight_bytes


@pytest.mark.parametrize("k", [4, 16])
def test_fast_needs_no_more_than_both_transposes_and_a_chunk(k: int) -> None:
    weight_bytes = 4 * OUTPUTS * INPUTS
    both = 4 * TOKENS * (OUTPUTS + INPUTS)
    assert max(transients("fast", k, torch.float32, torch.float32)) <= both + weight_bytes / 2


def keeping() -> tuple[list[torch.Tensor], AbstractContextManager[None]]:
    """What is saved for backward, once the context is entered."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    return kept, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


@pytest.mark.parametrize("formulation", ["fast", "frugal"])
def test_only_the_input_is_kept_for_backward(formulation: Any) -> None:
    case = random_case(OUTPUTS, INPUTS, 16, rank=8, tokens=(TOKENS,), bias=False)
    kept, hooks = keeping()
    with hooks:
        y = moram_linear(
            case.x, case.index_OK, case.factor_A_RI, case.factor_B_OR, scale=1.0,
            base=BaseWeight(case.weight_OI), formulation=formulation,
        )  # fmt: skip
    known = {t.data_ptr() for t in (case.x, case.weight_OI, case.index_OK, case.factor_A_RI, case.factor_B_OR)}
    assert {t.data_ptr() for t in kept} == known
    del y


def test_without_training_nothing_is_kept() -> None:
    case = random_case(OUTPUTS, INPUTS, 16, tokens=(TOKENS,))
    case.factor_A_RI.requires_grad_(False)
    case.factor_B_OR.requires_grad_(False)
    kept, hooks = keeping()
    with hooks:
        moram_linear(
            case.x, case.index_OK, case.factor_A_RI, case.factor_B_OR, scale=1.0, base=BaseWeight(case.weight_OI)
        )
    assert case.x.data_ptr() not in {t.data_ptr() for t in kept}


def test_adapter_and_optimizer_take_what_lora_takes_and_the_indices() -> None:
    """Against a dense mask (GPS) and SHiRA at the density, and LoRA at the rank, of one 1024 x 1024 layer in fp32."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    r, k, width = 8, 32, 1024

    def held(config: Any) -> int:
        model: Any = get_peft_model(torch.nn.Sequential(torch.nn.Linear(width, width, bias=False)), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        others = list(model.buffers())
        for module in model.modules():
            others += list(getattr(module, "shira_indices", {}).values())
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        return sum(t.nbytes for t in (*trained, *(p.grad for p in trained), *moments, *others))

    from raymem.methods.moram import MoRAMConfig

    factors = 16 * r * (width + width)  # weight, gradient and two moments
    moram = held(MoRAMConfig(r=r, k=k, target_modules=["0"]))
    lora = held(LoraConfig(r=r, target_modules=["0"]))
    shira = held(ShiraConfig(r=width * k // (2 * width), target_modules=["0"]))
    dense_mask = width * width * (1 + 4 + 8)  # mask, gradient and moments of the whole weight
    assert lora == factors
    assert moram == factors + 4 * width * k + 24
    assert shira == width * k * (16 + 8)
    assert moram < 0.51 * shira < dense_mask / 20


def test_the_values_of_the_update_are_found_by_chunks() -> None:
    case = random_case(1408, 1024, 4, rank=8)
    arguments = (case.index_OK, case.factor_A_RI, case.factor_B_OR, 1.0)
    selected_delta(*arguments)
    assert peak_bytes(lambda: selected_delta(*arguments)) < 0.2 * 4 * 1408 * 1024


def test_selection_holds_one_matrix_if_told_so() -> None:
    model = with_moram(small_llama(hidden_size=256, intermediate_size=640, num_hidden_layers=3), k=16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    batches = token_batches(1, length=16)
    select_indices(model, batches, group_bytes=1 << 40)
    in_groups = peak_bytes(lambda: select_indices(model, batches, group_bytes=1))
    at_once = peak_bytes(lambda: select_indices(model, batches, group_bytes=1 << 40))
    assert in_groups <= at_once / 4


@pytest.mark.slow
def test_selection_holds_a_group_of_gradients() -> None:
    """49 MB of targets in fp32, 8 batches, checkpointing: a quarter of what holding all gradients takes at most."""
    model = with_moram(
        small_llama(hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8), k=16
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    targets = sum(m.weight.nbytes for n, m in model.named_modules() if hasattr(m, "moram_A"))
    assert 45e6 < targets < 60e6
    batches = token_batches(2, length=64)
    select_indices(model, batches[:1], group_bytes=1 << 40)
    in_groups = peak_bytes(lambda: select_indices(model, batches))
    at_once = peak_bytes(lambda: select_indices(model, batches, group_bytes=1 << 40))
    assert at_once > targets
    assert in_groups <= at_once / 4


def test_selection_gives_everything_back() -> None:
    model, batches = with_moram(small_llama(hidden_size=256, intermediate_size=512)), token_batches(2)
    select_indices(model, batches)
    before = heap_in_use_bytes()
    select_indices(model, batches)
    assert heap_in_use_bytes() - before < 200_000

"""Plans of training loops that are no recipes, held against the meter around the real loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raymem.errors import BudgetError, PlanError
from raymem.memory.meter import PeakMeter, resident_tensors
from raymem.planner.module import plan_module

WIDTH, TOKENS = 256, 128


def network() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(500, WIDTH), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False),
                         nn.Linear(WIDTH, 500))  # fmt: skip


def next_token(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_peak_of_a_loop_of_ones_own_is_predicted(name: str) -> None:
    ids = torch.randint(500, (2, TOKENS))
    model = network()
    plan = plan_module(model, OPTIMIZERS[name], next_token, ids)
    optimizer = OPTIMIZERS[name](list(model.parameters()))

    def step() -> None:
        next_token(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    with PeakMeter(torch.device("cpu"), lambda: resident_tensors(model, [*states, ids])) as meter:
        step()
    assert meter.peak is not None
    assert abs(plan.step_peak_bytes - meter.peak.allocated_bytes) <= 0.01 * meter.peak.allocated_bytes
    assert plan.state["trainable"] == sum(p.numel() * 4 for p in model.parameters())
    assert plan.state["gradients"] == plan.state["trainable"]


def test_weights_on_meta_do_and_the_module_is_left_as_it_is() -> None:
    with torch.device("meta"):
        model, ids = network(), torch.empty(2, TOKENS, dtype=torch.int64)
    real = plan_module(network(), OPTIMIZERS["sgd"], next_token, torch.zeros(2, TOKENS, dtype=torch.int64))
    found = plan_module(model, OPTIMIZERS["sgd"], next_token, ids)
    assert (found.peak_bytes, found.terms) == (real.peak_bytes, real.terms)
    assert all(p.device.type == "meta" and p.grad is None for p in model.parameters())
    gpu = plan_module(model, OPTIMIZERS["sgd"], next_token, ids, gpu="T4")
    assert gpu.device == "cuda" and gpu.capacity_bytes > gpu.peak_bytes
    assert gpu.fits("14GiB") and not gpu.fits(1 << 20)


def test_what_decides_by_values_is_named() -> None:
    def clipped(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        loss = next_token(model, ids)
        return loss / 2 if loss.item() > 1 else loss

    with pytest.raises(PlanError, match="_local_scalar_dense"):
        plan_module(network(), OPTIMIZERS["sgd"], clipped, torch.zeros(2, TOKENS, dtype=torch.int64))
    with pytest.raises(BudgetError, match="unknown"):
        plan_module(network(), OPTIMIZERS["sgd"], next_token, torch.zeros(2, 4, dtype=torch.int64), gpu="X1")


def test_tied_weights_count_once() -> None:
    model: Any = network()
    model[2].weight = model[0].weight
    plan = plan_module(model, OPTIMIZERS["sgd"], next_token, torch.zeros(1, 8, dtype=torch.int64))
    assert plan.state["trainable"] == sum(p.numel() * 4 for p in model.parameters())

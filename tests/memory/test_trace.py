"""The tracer against sequences that can be worked out by hand, on real and on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from raymem.memory.trace import LimitPassed, Tracer, live_at, peak_of

KIB = 1024
FLOATS = 256  # of one KiB


@pytest.fixture(params=["real", "fake"])
def tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "real":
        yield
        return
    with FakeTensorMode():
        yield


@pytest.mark.usefixtures("tensors")
def test_the_peak_of_a_known_sequence() -> None:
    """+8, +16, -8, +4: the highest sum is 24."""
    with Tracer() as tracer:
        first = torch.empty(8 * FLOATS)
        second = torch.empty(16 * FLOATS)
        del first
        third = torch.empty(4 * FLOATS)
    found = peak_of(tracer.changes, wanted=lambda change: True)
    assert found.num_bytes == 24 * KIB
    assert [change.num_bytes // KIB for change in tracer.changes] == [8, 16, -8, 4]
    del second, third


@pytest.mark.usefixtures("tensors")
def test_views_and_writes_allocate_nothing() -> None:
    with Tracer() as tracer:
        base = torch.empty(4, FLOATS)
        base.view(-1)[2:].add_(1.0)
        kept = base.t()[:, 1:]
        del base
    assert [change.num_bytes // KIB for change in tracer.changes] == [4]
    del kept


@pytest.mark.usefixtures("tensors")
def test_what_a_storage_turns_out_to_be_counts_from_its_birth() -> None:
    with Tracer() as tracer:
        tracer.phase = "forward"
        weight = torch.zeros(FLOATS, requires_grad=True)
        tracer.adopt(weight, "trainable", "weight")
        (weight * weight).sum().backward()
        tracer.adopt(weight.grad, "gradients", "weight (gradient)")
        at_end = len(tracer.changes) - 1
    held = {live.category: live.num_bytes for live in live_at(tracer.changes, at_end)}
    assert held == {"trainable": KIB, "gradients": KIB}
    assert {c.phase for c in tracer.changes if c.record.category == "gradients"} == {"backward"}


@pytest.mark.usefixtures("tensors")
def test_what_checkpointing_repeats_in_backward_is_activations() -> None:
    layer = nn.Linear(FLOATS, FLOATS, bias=False)
    x = torch.zeros(1, FLOATS, requires_grad=True)
    with Tracer() as tracer:
        tracer.phase = "forward"
        checkpoint(lambda value: torch.tanh(layer(value)), x, use_reentrant=False).sum().backward()
    repeated = [c.record for c in tracer.changes if c.phase == "backward" and c.record.operation == "aten::tanh"]
    assert repeated and {record.category for record in repeated} == {"activations"}
    temporaries = {c.record.category for c in tracer.changes if c.record.operation == "aten::tanh_backward"}
    assert temporaries == {"workspace"}


def test_what_a_module_repeats_without_gradients_is_activations_too() -> None:
    """As in the forward pass of an autograd function."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.cosh()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad.sinh()

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Doubled.apply(x)

    block, x = Block(), torch.ones(FLOATS, requires_grad=True)
    with Tracer() as tracer:
        handles = tracer.watch(block)
        tracer.phase = "forward"
        checkpoint(lambda x: block(x).tanh(), x, use_reentrant=False).sum().backward()
        for handle in handles:
            handle.remove()
    made = {(c.record.operation, c.record.category) for c in tracer.changes if c.phase == "backward"}
    assert ("aten::cosh", "activations") in made and ("aten::sinh", "workspace") in made


def test_resized_storages_are_followed() -> None:
    """How FSDP2 frees gathered weights and takes them back."""
    with Tracer() as tracer:
        gathered = torch.empty(8 * FLOATS)
        storage = gathered.untyped_storage()
        storage.resize_(0)
        storage.resize_(8 * KIB)
    assert [change.num_bytes // KIB for change in tracer.changes] == [8, -8, 8]


def test_storages_are_named_by_the_module_that_runs() -> None:
    model = nn.Sequential(nn.Linear(4, FLOATS), nn.Sequential(nn.ReLU()))
    with Tracer() as tracer:
        handles = tracer.watch(model)
        kept = model(torch.zeros(1, 4))
        for handle in handles:
            handle.remove()
        model(torch.zeros(1, 4))
    assert {c.record.name for c in tracer.changes if c.record.operation == "aten::relu"} == {"1.0", ""}
    del kept


def test_memory_inside_a_kernel_counts_while_its_result_is_there() -> None:
    with Tracer(lambda func, args, result: 5 * KIB if func._schema.name == "aten::neg" else 0) as tracer:
        x = torch.zeros(FLOATS)
        y = x.neg()
    assert peak_of(tracer.changes, wanted=lambda change: True).num_bytes == (1 + 1 + 5) * KIB
    del x, y


@pytest.mark.usefixtures("tensors")
def test_a_limit_ends_the_program_after_the_phase_that_passes_it() -> None:
    """+8, +16, -8, +4, then another phase: the first one's peak is 24."""

    def program(limit_bytes: int) -> Tracer:
        with Tracer() as tracer:
            tracer.phase, tracer.limit_bytes = "forward", limit_bytes
            a = torch.zeros(8 * FLOATS)
            b = torch.zeros(16 * FLOATS)
            del a
            c = torch.zeros(4 * FLOATS)
            tracer.phase = "step"
            del b  # what goes ends nothing
            d = torch.zeros(FLOATS)
        del c, d
        return tracer

    with pytest.raises(LimitPassed) as passed:
        program(24 * KIB - 1)
    assert (passed.value.num_bytes, passed.value.phase) == (24 * KIB, "forward")
    assert program(24 * KIB).changes[-1].phase == "step"


def test_a_limit_that_backward_passes_ends_it_where_less_is_held_again() -> None:
    """Of two checkpointed segments, each of which holds 32 KiB while it is repeated, the second one is not."""
    calls: list[int] = []

    def segment(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        for _ in range(4):
            x = x.exp()
        return x

    weight = torch.zeros(8 * FLOATS, requires_grad=True)
    with Tracer() as tracer:
        tracer.phase, tracer.limit_bytes = "forward", 44 * KIB
        tracer.adopt(weight, "trainable", "w")
        middle = checkpoint(segment, weight, use_reentrant=False)
        loss = checkpoint(segment, middle, use_reentrant=False).sum()
        with pytest.raises(LimitPassed) as passed:
            loss.backward()
    assert len(calls) == 3
    assert passed.value.phase == "backward" and 48 * KIB <= passed.value.num_bytes < 80 * KIB

"""Fake tensors: the memory of results against FakeTensorMode itself, and what each shim is needed for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from raymem.memory.trace import Tracer
from raymem.planner.tracing import step_trace
from raymem.planner.tracing.fake import CudaAutocast
from raymem.planner.tracing.fake_cache import OutputCache
from raymem.planner.types import Target
from tests.helpers.planner_cases import case
from tests.helpers.support import make_recipe

Program = Callable[[], list[torch.Tensor]]


def views() -> list[torch.Tensor]:
    base = torch.empty(6, 4)
    parts = base.split(2)
    return [base, *parts, *base.unbind(1), base[1:, ::2].T, base.view(-1)[3:], base.expand(2, 6, 4), base.T.reshape(-1)]


def in_place() -> list[torch.Tensor]:
    base, out = torch.zeros(6, 4), torch.empty(6, 6)
    return [base.add_(1.0), base[2:].mul_(2.0), torch.mm(base, base.T, out=out), out]


def factories() -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    drawn = torch.randn(3, 4, generator=source, dtype=torch.float64)
    return [torch.arange(0, 8, 2), torch.ones(2, 3), torch.ones(2, 3), torch.randperm(5, generator=source), drawn]


def mixed() -> list[torch.Tensor]:
    half, index = torch.empty(4, 8, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int64)
    values, places = half.float().topk(2, dim=1)
    return [half + 1, half * torch.ones(8), half.gather(1, index), values, places, half.sum(0), half.detach()]


def described(tensors: list[torch.Tensor]) -> list[Any]:
    """Geometry, and which tensors share a storage."""
    storages = [t.untyped_storage()._cdata for t in tensors]
    assert all(type(t) is FakeTensor and t.device == torch.device("cpu") and not t.requires_grad for t in tensors)
    return [
        (t.shape, t.stride(), t.dtype, t.storage_offset(), t.untyped_storage().nbytes(), storages.index(storage))
        for t, storage in zip(tensors, storages, strict=True)
    ]


@pytest.mark.parametrize("program", [views, in_place, factories, mixed])
def test_results_are_those_of_fake_tensor_mode(program: Program) -> None:
    with FakeTensorMode():
        expected = described(program())
    for _ in range(2):  # the second session finds what the first one left
        with FakeTensorMode() as mode:
            cache = OutputCache(mode)
            with Tracer(call=cache):
                assert described(program()) == expected
                before, found = cache.hits, program()
        assert cache.hits - before >= len(found) - 1, "nearly all is known by now"


def test_what_the_default_dtype_decides_is_not_mistaken() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with FakeTensorMode() as mode, Tracer(call=OutputCache(mode)):
                assert torch.zeros(3).dtype == dtype
        finally:
            torch.set_default_dtype(torch.float32)


def test_rows_of_one_example_get_no_mask_thanks_to_a_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(case("lora").to_dict(), {"data": {"packing": "wrapped"}})

    def allocated_bytes() -> int:
        return sum(max(0, change.num_bytes) for change in step_trace.trace_step(recipe, Target("cpu", 1)).changes)

    shimmed = allocated_bytes()
    monkeypatch.setattr(step_trace, "shims", lambda **options: contextlib.nullcontext())
    assert allocated_bytes() > shimmed


def test_autocast_of_a_planned_gpu_casts_where_cuda_does() -> None:
    half = torch.ones(4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.rsqrt(half).dtype == torch.bfloat16
        with CudaAutocast():
            assert torch.rsqrt(half).dtype == torch.float32
            assert torch.mm(half[None], half[:, None]).dtype == torch.bfloat16
    with CudaAutocast():
        assert torch.rsqrt(half).dtype == torch.bfloat16, "outside autocast nothing is cast"

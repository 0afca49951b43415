"""8-bit AdamW: against a straight-line version, at its limit, in bytes, and spread over workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from raymem.errors import RecipeError
from raymem.memory.meter import PeakMeter, storage_bytes
from raymem.methods.adam8bit import AdamW8bit, optimizer
from raymem.planner.analytic import closed_form
from raymem.planner.plan import make_plan
from raymem.planner.tracing.step_trace import planned_model, trace_step
from raymem.planner.types import Target
from raymem.storage.storage import Storage
from raymem.training.checkpoint import Checkpoints
from raymem.training.dist_env import DistEnv
from raymem.training.manifest import Manifest
from raymem.training.model.build import build_model
from raymem.training.optim import Updater, build_updater
from tests.helpers.planner_cases import case
from tests.helpers.support import in_processes, make_recipe

pytest.importorskip("bitsandbytes")

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1


def code_values(*, signed: bool) -> torch.Tensor:
    """The dynamic tree data type: i leading zeros scale by 10^-i, the other bits divide [0.1, 1] evenly."""
    values = [0.0, 1.0]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (bits + (not signed)) + 1)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (bits - 6)).tolist()
        values += [*middles, *(-value for value in middles if signed)]
    return torch.tensor(values).sort().values


def moments_of(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Both moments, flat, from the state alone: code values, scaled by the number that belongs to 256 of them."""
    moments = []
    for codes, scales, signed in zip(optimizer.CODES, optimizer.SCALES, (True, False), strict=True):
        values = code_values(signed=signed)[state[codes].flatten().long()]
        moments.append(values * state[scales].flatten().repeat_interleave(256)[: len(values)])
    return moments


def assert_stored(moment: torch.Tensor, stored: torch.Tensor, *, signed: bool) -> None:
    """Each number is one of the two code values around it, and the largest of a block gives the scale.

    (Below a ten-thousandth of the scale bitsandbytes' CPU kernel rounds more coarsely.)
    """
    values = code_values(signed=signed)
    for start in range(0, len(moment), 256):
        block = slice(start, start + 256)
        scale = moment[block].abs().max()
        above = torch.searchsorted(values, moment[block] / scale).clamp(1, 255)
        gaps = values[above] - values[above - 1]
        assert ((stored[block] - moment[block]).abs() <= scale * (1.001 * gaps).clamp_min(3e-5)).all()


def test_it_follows_the_straight_line_version() -> None:
    torch.manual_seed(0)
    shape = (40, 130)  # 5200 numbers: 20 blocks and a part of one
    parameter = nn.Parameter(torch.randn(shape))
    expected = parameter.detach().flatten().clone()
    moment = square = torch.zeros(expected.numel())
    stepper = AdamW8bit([parameter], LR, BETAS, EPS, DECAY)
    for step in range(1, 5):
        gradient = torch.randn(shape) * torch.rand(shape)
        parameter.grad = gradient.clone()
        stepper.step()
        moment = BETAS[0] * moment + (1 - BETAS[0]) * gradient.flatten()
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient.flatten() ** 2
        expected *= 1 - LR * DECAY
        expected -= LR * (moment / (1 - BETAS[0] ** step)) / ((square / (1 - BETAS[1] ** step)).sqrt() + EPS)
        torch.testing.assert_close(parameter.detach().flatten(), expected, rtol=1e-5, atol=1e-6)
        stored = moments_of(stepper.state[parameter])
        assert_stored(moment, stored[0], signed=True)
        assert_stored(square, stored[1], signed=False)
        moment, square = stored


def test_where_a_block_has_one_value_it_is_adamw() -> None:
    """The largest of a block is represented exactly, if it is positive; so are gradients that are the same in it."""
    torch.manual_seed(0)
    start = torch.randn(16, 512)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steppers = [AdamW8bit([ours], LR, BETAS, EPS, DECAY), torch.optim.AdamW([theirs], LR, BETAS, EPS, DECAY)]
    for _ in range(6):
        gradient = torch.rand(16, 2, 1).expand(16, 2, 256).reshape(16, 512)
        for parameter, stepper in zip((ours, theirs), steppers, strict=True):
            parameter.grad = gradient.clone()
            stepper.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours, start)


def test_small_parameters_are_updated_as_by_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(63, 65)  # 4095 numbers
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steppers = [AdamW8bit([ours], LR, BETAS, EPS, DECAY), torch.optim.AdamW([theirs], LR, BETAS, EPS, DECAY)]
    for _ in range(4):
        gradient = torch.randn(63, 65)
        for parameter, stepper in zip((ours, theirs), steppers, strict=True):
            parameter.grad = gradient.clone()
            stepper.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert set(steppers[0].state[ours]) == set(optimizer.WHOLE)


def test_what_is_updated_at_once_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for at_once in (1 << 20, 512):
        monkeypatch.setitem(optimizer._AT_ONCE, "cpu", at_once)
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(33, 150))
        stepper = AdamW8bit([parameter], LR, BETAS, EPS, DECAY)
        for _ in range(3):
            parameter.grad = torch.randn(33, 150)
            stepper.step()
        results.append([parameter.detach(), *stepper.state[parameter].values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compressed", [True, False])
def test_the_memory_inside_the_cpu_kernel_is_known(
    dtype: torch.dtype, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "is_compressed", lambda shape, sharded: compressed)
    numel = 1 << 18
    parameter = nn.Parameter(torch.randn(numel // 256, 256).to(dtype))
    parameter.grad = torch.randn_like(parameter)
    stepper = AdamW8bit([parameter])
    stepper.step()
    with PeakMeter(torch.device("cpu"), list) as meter:
        stepper.step()
    assert meter.peak is not None
    copies = optimizer._FP32_COPIES[compressed] + (dtype != torch.float32)
    assert meter.peak.allocated_bytes == pytest.approx(4 * copies * numel, rel=0.001)


def test_two_moments_take_little_more_than_two_bytes() -> None:
    parameter = nn.Parameter(torch.zeros(512, 512))
    stepper = AdamW8bit([parameter])
    stepper.allocate_state()
    assert storage_bytes(stepper.state[parameter].values()) == 2 * 512 * 512 * (1 + 4 / 256)


# ---- spread over workers

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 128}


def sharded_state(raw: dict[str, Any], storage: str, load: bool) -> dict[str, torch.Tensor]:
    """Two steps on this many ranks, or what is read from the checkpoint of such; whole tensors of the state."""
    recipe = make_recipe(raw, {"scaling": {"num_workers": dist.get_world_size()}})
    dist_env = DistEnv.current(recipe)
    model = build_model(recipe, dist_env)
    updater = build_updater(model, recipe)
    checkpoints = Checkpoints(Storage.open(storage), dist_env)
    if load:
        updater.allocate_state()
        manifest = checkpoints.latest()
        assert manifest is not None
        checkpoints.load(manifest, updater.state())
    else:
        step_with_known_gradients(updater)
        checkpoints.save(Manifest(2, {}, recipe.to_dict(), None), updater.state(), "last", 1)
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in updater.state().items()}
    return {name: tensor.detach().contiguous() for name, tensor in whole.items()}


def step_with_known_gradients(updater: Updater) -> None:
    for number in range(2):
        updater.begin(number, 1e-2)
        for index, parameter in enumerate(updater.updated.values()):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * number + index))
            if isinstance(parameter, DTensor):
                from torch.distributed.tensor import distribute_tensor

                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        updater.step()


@pytest.mark.slow
def test_shards_are_those_of_one_process_and_any_number_of_workers_goes_on(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, **WIDE}
    raw = {
        "model": {"name": None, "config": config, "tokenizer": "demo"},
        "adapter": "none",
        "optimizer": "adamw_8bit",
        "scaling": {"strategy": "fsdp2"},
    }
    alone = build_updater(build_model(one := make_recipe(raw, {"scaling": {"strategy": "ddp"}})), one)
    step_with_known_gradients(alone)
    storage = str(tmp_path / "run")
    Path(storage).mkdir()
    first, second = in_processes(sharded_state, 2, tmp_path / "two", raw, storage, False)
    [again] = in_processes(sharded_state, 1, tmp_path / "one", raw, storage, True)
    expected = alone.state()
    assert any(name.endswith("exp_avg_codes") for name in expected)
    for name, value in expected.items():
        assert torch.equal(first[name], value), name
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], again[name]), name


def test_rows_that_are_no_whole_blocks_keep_whole_moments_where_they_are_sharded() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        model = nn.Sequential(nn.Linear(576, 64, bias=False), nn.Linear(512, 64, bias=False))
        fully_shard(model)
        stepper = AdamW8bit(model.parameters())
        stepper.allocate_state()
        odd, whole = (stepper.state[parameter] for parameter in model.parameters())
        assert set(odd) == set(optimizer.WHOLE) and set(whole) == {*optimizer.CODES, *optimizer.SCALES}
        assert whole["exp_avg_scales"].shape == (64, 2)
        assert whole["exp_avg_scales"].to_local().shape == (16, 2)
    finally:
        dist.destroy_process_group()


# ---- planned


@pytest.mark.slow
def test_the_state_of_shards_has_its_closed_form() -> None:
    config = {**WIDE, "intermediate_size": 344}  # the rows of down_proj are no whole blocks
    recipe = make_recipe(
        case("full", layers=1).to_dict(),
        {"model": {"config": config}, "optimizer": "adamw_8bit", "scaling": {"strategy": "fsdp2", "num_workers": 4}},
    )
    target = Target.of(recipe)
    model = planned_model(recipe)
    known, session = closed_form(recipe, target, model), trace_step(recipe, target)
    assert known == session.state
    weights = session.state["trainable"]
    assert weights / 2 < session.state["optimizer"] < weights  # 2.03 bytes a number, and 8 of those that are whole


def test_pages_are_a_column_of_the_plan_and_no_memory_of_the_gpu() -> None:
    recipe = make_recipe(
        case("full", layers=1).to_dict(),
        {"model": {"config": {"vocab_size": 1024}}, "scaling": {"use_gpu": True}},
        {"optimizer": {"kind": "adamw_8bit", "paged": True}},
    )
    target = Target.of(recipe)
    session = trace_step(recipe, target)
    model = planned_model(recipe)
    assert closed_form(recipe, target, model) == session.state
    plan = make_plan(session, target, None)
    pages = 2 * 2 * 1024 * 128  # two moments of embedding and head, which alone have 100000 numbers
    assert plan.host_bytes == plan.host_terms["optimizer"] == pages
    whole = make_recipe(recipe.to_dict(), {"optimizer": {"paged": False}})
    assert plan.state["optimizer"] == closed_form(whole, target, model)["optimizer"] - pages
    assert plan.terms["optimizer"] <= plan.state["optimizer"]


def test_without_bitsandbytes_the_recipe_is_planned_and_training_names_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe(case("full").to_dict(), {"optimizer": "adamw_8bit"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert make_plan(trace_step(recipe, Target.of(recipe)), Target.of(recipe), None).peak_bytes > 0
    with pytest.raises(
        RecipeError, match=r"optimizer\.kind: adamw_8bit needs bitsandbytes: pip install 'raymem\[quant"
    ):
        build_updater(build_model(recipe), recipe)

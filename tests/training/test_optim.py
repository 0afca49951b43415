"""What keeps bf16 weights trainable, and the state that a checkpoint sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from raymem.errors import RecipeError
from raymem.linalg import stochastic_round
from raymem.methods.plain.stochastic_adamw import StochasticRoundingAdamW
from raymem.seeds import generator
from raymem.training.model.build import build_model
from raymem.training.optim import Updater, build_updater, lr_factor
from tests.helpers.support import assert_same, make_recipe, snapshot

pytestmark = pytest.mark.numerics

OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


class Toy(nn.Module):
    """Two matrices whose loss is the distance of their product from a fixed one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)
        first, second, goal = (torch.randn(24, 24, generator=source) / 5 for _ in range(3))
        # All precisions start from the same values.
        self.first = nn.Parameter(first.bfloat16().to(dtype))
        self.second = nn.Parameter(second.bfloat16().to(dtype))
        self.goal = goal

    def backward(self) -> None:
        loss = (self.first.float() @ self.second.float() - self.goal).square().mean()
        torch.autograd.backward(loss)


def toy_updater(model: nn.Module, precision: str, master: str, **changes: Any) -> Updater:
    return build_updater(model, make_recipe({"train": {"precision": precision, "master": master}}, changes))


def after(steps: int, precision: str, master: str, seed: int = 0) -> torch.Tensor:
    """The first matrix after some steps; the master where there is one."""
    model = Toy(torch.float32 if precision == "fp32" else torch.bfloat16)
    updater = toy_updater(model, precision, master, seed=seed)
    for step in range(steps):
        model.backward()
        updater.gradients()
        updater.begin(step, lr=1e-4)
        updater.step()
    return updater.updated["first"].detach().float()


def test_masters_and_rounding_follow_fp32_where_plain_bf16_loses_the_updates() -> None:
    start, exact = after(0, "fp32", "none"), after(50, "fp32", "none")
    moved = (exact - start).norm()

    def drift(precision: str, master: str) -> float:
        return float((after(50, precision, master) - exact).norm() / moved)

    assert drift("bf16", "fp32") < 0.05
    # Each weight is off by up to a bf16 step, but their mean moves as it should; plain bf16 stays behind.
    direction = (exact - start) / moved
    progress = {master: float(((after(50, "bf16", master) - start) * direction).sum() / moved) for master in (
        "stochastic_rounding", "none")}  # fmt: skip
    assert progress["stochastic_rounding"] == pytest.approx(1, abs=0.1)
    assert progress["none"] < 0.7
    assert drift("bf16", "none") > 10 * drift("bf16", "fp32")


def test_parameters_are_their_masters_rounded() -> None:
    model = Toy(torch.bfloat16)
    updater = toy_updater(model, "bf16", "fp32")
    for step in range(3):
        model.backward()
        updater.gradients()
        updater.begin(step, lr=1e-2)
        updater.step()
    for name, master in updater.masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(updater.parameters[name], master.bfloat16())


def test_rounding_is_without_bias_and_to_a_neighbour() -> None:
    values = torch.linspace(-3, 3, 257)
    lower = values.view(torch.int32) & -(1 << 16)
    towards_zero = lower.view(torch.float32)
    away = (lower + (1 << 16)).view(torch.float32)
    count = 4000
    rounded = torch.stack([stochastic_round(values, generator(0, n)).float() for n in range(count)])
    assert torch.isin(rounded, torch.cat([towards_zero, away])).all()
    assert ((rounded == towards_zero) | (rounded == away)).all()
    gap = (away - towards_zero).abs()
    error = (rounded.mean(0) - values).abs()
    assert (error <= 5 * 0.5 * gap / math.sqrt(count) + 1e-12).all(), "five standard errors of a coin"


def test_what_bf16_can_hold_is_not_rounded() -> None:
    exact = torch.randn(1000, generator=generator(0)).bfloat16()
    assert torch.equal(stochastic_round(exact.float(), generator(1)), exact)


def rounding_optimizer(named: Mapping[str, nn.Parameter], seed: int = 0) -> StochasticRoundingAdamW:
    return StochasticRoundingAdamW(named, seed=seed, **OPTIONS)


def rounded_once(name: str = "w", seed: int = 0, step: int = 0) -> torch.Tensor:
    parameter = nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    updater = Updater({name: parameter}, lambda named: rounding_optimizer(named, seed), masters=False)
    updater.begin(step, lr=1e-4)
    updater.step()
    return parameter.detach()


def test_rounding_is_a_function_of_seed_step_and_name() -> None:
    before = torch.random.get_rng_state()
    assert torch.equal(rounded_once(), rounded_once())
    assert torch.equal(torch.random.get_rng_state(), before)
    for other in (rounded_once(seed=1), rounded_once(step=1), rounded_once(name="v")):
        assert not torch.equal(rounded_once(), other)


def test_rounding_adamw_with_room_to_spare_is_adamw() -> None:
    """With a rate so large that rounding is noise, one step differs from torch's by at most one bf16 step."""
    start = torch.randn(200, generator=generator(0)).bfloat16()
    grad = torch.randn(200, generator=generator(1)).bfloat16()
    ours, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours.grad, exact.grad = grad.clone(), grad.float()
    arguments = {**OPTIONS, "lr": 0.1}
    StochasticRoundingAdamW({"w": ours}, seed=0, **arguments).step()
    torch.optim.AdamW([exact], **arguments).step()
    assert ((ours.float() - exact).abs() <= exact.abs() * 2**-7 + 1e-6).all()


@pytest.mark.parametrize(("precision", "master"), [
    ("fp32", "none"), ("bf16", "fp32"), ("bf16", "stochastic_rounding"), ("bf16", "none"), ("bf16_mixed", "fp32")
])  # fmt: skip
def test_state_names_and_dtypes(precision: str, master: str) -> None:
    model = Toy(torch.bfloat16 if precision == "bf16" else torch.float32)
    updater = toy_updater(model, precision, master)
    updater.allocate_state()
    state = updater.state()
    has_masters = (precision, master) == ("bf16", "fp32")
    names = {f"weights.{n}" for n in ("first", "second")}
    names |= {f"optimizer.{n}.{key}" for n in ("first", "second") for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(state) == names | ({"master.first", "master.second"} if has_masters else set())
    assert all(state[name].dtype == torch.float32 for name in state if name.startswith("master."))
    moments = torch.bfloat16 if (precision, master) == ("bf16", "none") else torch.float32
    assert {state[f"optimizer.first.{key}"].dtype for key in ("exp_avg", "exp_avg_sq")} == {moments}
    for name, parameter in model.named_parameters():
        assert state[f"weights.{name}"].data_ptr() == parameter.data_ptr(), "views: what is loaded arrives"


@pytest.mark.parametrize("master", ["fp32", "stochastic_rounding", "none"])
def test_allocating_state_changes_no_weights(master: str) -> None:
    model = Toy(torch.bfloat16)
    updater = toy_updater(model, "bf16", master, optimizer={"weight_decay": 0.5})
    before = snapshot(updater.state())
    updater.allocate_state()
    assert_same({name: value for name, value in updater.state().items() if name in before}, before)
    assert all(parameter.grad is None for parameter in [*model.parameters(), *updater.masters.values()])


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_the_wanted_implementation_runs(implementation: str) -> None:
    updater = toy_updater(Toy(torch.float32), "fp32", "none", optimizer={"implementation": implementation})
    assert updater.optimizer.defaults[implementation] is True


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    for master in ("fp32", "stochastic_rounding"):
        model = Toy(torch.bfloat16)
        updater = toy_updater(model, "bf16", master)
        model.first.grad = torch.ones_like(model.first)
        before = model.second.detach().clone()
        assert len(updater.gradients()) == 1
        updater.begin(0, lr=0.1)
        updater.step()
        assert torch.equal(model.second, before)
        assert all(not name.startswith("optimizer.second") for name in updater.state())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.25, 10])
def test_the_learning_rate_rises_to_the_peak_and_falls_towards_zero(schedule: str, warmup: float) -> None:
    total = 40
    factors = [lr_factor(step, total, schedule, warmup) for step in range(total)]
    top = int(warmup) if warmup >= 1 else int(warmup * total)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert max(factors) == 1.0 == factors[top]
    assert all(0 < factor <= 1 for factor in factors), "no step is wasted on a rate of zero"
    assert lr_factor(total, total, schedule, warmup) == pytest.approx(1.0 if schedule == "constant" else 0.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_half_way_is_half_the_peak(schedule: str) -> None:
    assert lr_factor(50, 100, schedule, 0) == pytest.approx(0.5)


def test_a_run_may_be_all_warmup() -> None:
    assert lr_factor(0, 1, "cosine", 0.03) == 1.0
    assert [lr_factor(step, 4, "linear", 8) for step in range(4)] == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])


@pytest.mark.parametrize("rank", [32, 40])
def test_a_rank_that_saves_nothing_is_refused_by_the_recipe(llama: Path, rank: int) -> None:
    fragment = {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "rank": rank, "min_dim": 8}}
    recipe = make_recipe(fragment, model=llama)
    message = rf"optimizer\.rank: {rank} is not below min\(m, n\) = \d+ of model\.\S+ .* set optimizer.min_dim above"
    with pytest.raises(RecipeError, match=message):
        build_updater(build_model(recipe, meta=True), recipe)


def test_an_unknown_optimizer_is_built_as_no_other() -> None:
    unknown = make_recipe().model_copy(update={"optimizer": SimpleNamespace(kind="new")})
    with pytest.raises(RecipeError, match="'new' is not registered"):
        build_updater(Toy(torch.float32), unknown)


def test_embeddings_can_be_left_uncompressed(llama: Path) -> None:
    for compressed in (True, False):
        options = {"kind": "mlorc_adamw", "min_dim": 8, "compress_embeddings": compressed}
        recipe = make_recipe({"adapter": "none", "optimizer": options}, model=llama)
        updater = build_updater(build_model(recipe, meta=True), recipe)
        group = updater.optimizer.param_groups[-1]
        assert (group["rank"] is None) is not compressed
        assert compressed or group["param_names"] == ["model.embed_tokens.weight"]


def test_a_rounding_optimizer_goes_on_from_its_state_dict() -> None:
    """torch would cast the moments to the parameter's dtype; other trainers load them this way."""

    def step(parameter: nn.Parameter, optimizer: StochasticRoundingAdamW, number: int) -> None:
        parameter.grad = torch.randn(200, generator=generator(number)).bfloat16()
        optimizer.step()

    whole = nn.Parameter(torch.ones(200, dtype=torch.bfloat16))
    first = rounding_optimizer({"w": whole})
    step(whole, first, 0)
    again = nn.Parameter(whole.detach().clone())
    second = rounding_optimizer({"w": again})
    second.load_state_dict(first.state_dict())
    step(whole, first, 1)
    step(again, second, 1)
    assert torch.equal(whole, again)
    assert {value.dtype for value in second.state[again].values()} == {torch.float32}

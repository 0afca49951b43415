"""MLorc's numbers: its limits, and an independent straight-line version of the paper's algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from raymem.methods.mlorc import MLorcAdamW, MLorcLion
from tests.helpers.straight_line import StraightLineAdamW, StraightLineLion
from tests.helpers.streams import gradient_stream

pytestmark = pytest.mark.numerics

SHAPES = [(40, 24), (24, 40), (32, 32)]
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}


def run(
    make: Callable[..., torch.optim.Optimizer], shape: tuple[int, ...], steps: int = 50, **options: Any
) -> torch.Tensor:
    """A parameter after some steps with gradients that are the same for every optimizer."""
    source = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, generator=source))
    optimizer = make([parameter], **{**OPTIONS, **options})
    for _ in range(steps):
        parameter.grad = torch.randn(shape, generator=source)
        optimizer.step()
    return parameter.detach()


class PlainLion(torch.optim.Optimizer):
    """Lion as Chen et al. write it."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter))
                beta1, beta2 = group["betas"]
                update = (beta1 * moment + (1 - beta1) * parameter.grad).sign()
                parameter -= group["lr"] * (update + group["weight_decay"] * parameter)
                moment.copy_(beta2 * moment + (1 - beta2) * parameter.grad)


@pytest.mark.parametrize("second_moment", ["raw", "sqrt"])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_adamw(shape: tuple[int, int], second_moment: str) -> None:
    found = run(MLorcAdamW, shape, rank=min(shape), min_dim=1, second_moment=second_moment)
    torch.testing.assert_close(found, run(torch.optim.AdamW, shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_lion(shape: tuple[int, int]) -> None:
    found, expected = run(MLorcLion, shape, rank=min(shape), min_dim=1), run(PlainLion, shape)
    # An update whose sign hangs on the last bit may differ; hardly any does.
    differing = (found - expected).abs() > 1e-5
    assert differing.float().mean() < 2e-3


def test_low_rank_is_not_adamw() -> None:
    assert (run(MLorcAdamW, (40, 24), rank=2, min_dim=1) - run(torch.optim.AdamW, (40, 24))).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (2, 64)])
def test_what_is_not_a_large_matrix_gets_plain_adamw_exactly(shape: tuple[int, ...]) -> None:
    """Bit for bit as torch's fused kernel, which it calls; torch's other kernels round each of the steps otherwise."""
    found, steps, eps = run(MLorcAdamW, shape), 50, torch.finfo(torch.float32).eps
    assert torch.equal(found, run(torch.optim.AdamW, shape, fused=True))
    # Per step half an eps of the weight in either kernel, and a few of the update, which is about lr.
    near = {"rtol": steps * eps, "atol": steps * 4 * eps * OPTIONS["lr"]}
    expected = run(torch.optim.AdamW, shape, foreach=False)
    torch.testing.assert_close(found, expected, **near)
    assert not torch.allclose(run(MLorcAdamW, shape, weight_decay=0.099), expected, **near), "1 % less decay is seen"
    torch.testing.assert_close(run(MLorcLion, shape), run(PlainLion, shape))


def test_a_group_can_be_left_uncompressed() -> None:
    parameter, other = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64))
    groups: list[dict[str, Any]] = [{"params": [parameter], "rank": None}, {"params": [other], "rank": 7}]
    optimizer = MLorcAdamW(groups)
    for tensor in (parameter, other):
        tensor.grad = torch.randn(64, 64)
    optimizer.step()
    assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[other]["exp_avg.left"].shape == (64, 7)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def cosine(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found * exact).sum() / found.norm() / exact.norm())


def compare(rank: int, second_moment: str) -> dict[str, tuple[float, float]]:
    """Mean over the matrices of a model, ours and the straight-line version's, after 30 real gradients.

    Both get the same gradients, whatever their updates would have made of the weights; exact moments are the measure.
    """
    stream, (beta1, beta2) = gradient_stream(), (0.9, 0.999)
    sums: dict[str, list[tuple[float, float]]] = {"first": [], "second": [], "cosine": []}
    for name in stream[0]:
        torch.manual_seed(0)
        line = StraightLineAdamW(rank)
        parameter = nn.Parameter(torch.zeros_like(stream[0][name]))
        optimizer = MLorcAdamW([parameter], lr=1.0, rank=rank, min_dim=1, second_moment=second_moment)  # type: ignore[arg-type]
        first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for gradients in stream:
            gradient = gradients[name]
            first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2
            theirs = line.step(torch.zeros_like(gradient), gradient)
            nn.init.zeros_(parameter)
            parameter.grad = gradient
            optimizer.step()
        exact = (first / (1 - beta1 ** len(stream))) / ((second / (1 - beta2 ** len(stream))).sqrt() + 1e-8)
        state = optimizer.state[parameter]
        ours = [state[f"{moment}.left"] @ state[f"{moment}.right"] for moment in ("exp_avg", "exp_avg_sq")]
        if second_moment == "sqrt":
            ours[1].square_()
        assert line.first is not None and line.second is not None
        line_moments = [left * values @ right.T for left, values, right in (line.first, line.second)]
        sums["first"].append((error(ours[0], first), error(line_moments[0], first)))
        sums["second"].append((error(ours[1], second), error(line_moments[1], second)))
        sums["cosine"].append((cosine(-parameter.detach(), exact), cosine(theirs, exact)))
    return {key: tuple(sum(column) / len(column) for column in zip(*pairs, strict=True)) for key, pairs in sums.items()}


@pytest.mark.parametrize("rank", [4, 32])
def test_as_accurate_as_the_straight_line_version(rank: int) -> None:
    found = compare(rank, "raw")
    assert found["first"][0] <= found["first"][1]
    assert found["second"][0] <= found["second"][1]
    # A few entries of V close to zero decide over the cosine; its spread over seeds of either sketch is about 0.01.
    assert found["cosine"][0] >= found["cosine"][1] - 0.01
    assert found["cosine"][0] < 0.99, "the comparison is one of approximations"


@pytest.mark.parametrize("rank", [4, 32])
def test_the_root_space_gives_as_good_a_direction(rank: int) -> None:
    found = compare(rank, "sqrt")
    assert found["cosine"][0] >= found["cosine"][1]


def test_lion_follows_the_straight_line_version() -> None:
    stream = gradient_stream()
    name = "layers.layers.0.linear1.weight"
    line, parameter = StraightLineLion(rank=32), nn.Parameter(torch.zeros_like(stream[0][name]))
    optimizer = MLorcLion([parameter], lr=1.0, rank=32, min_dim=1)
    exact = torch.zeros_like(parameter)
    torch.manual_seed(0)
    for gradients in stream:
        gradient = gradients[name]
        direction = (0.9 * exact + 0.1 * gradient).sign()
        exact = 0.99 * exact + 0.01 * gradient
        theirs = line.step(torch.zeros_like(gradient), gradient)
        nn.init.zeros_(parameter)
        parameter.grad = gradient
        optimizer.step()
    assert cosine(-parameter.detach(), direction) >= cosine(theirs, direction) - 0.01


def test_a_repaired_second_moment_is_what_the_paper_says() -> None:
    from raymem.linalg import LowRank
    from raymem.methods.mlorc.update import Matrix, mean_of_cut

    source = torch.Generator().manual_seed(0)
    left, right = torch.randn(50, 3, generator=source), torch.randn(3, 70, generator=source)
    product = left @ right
    matrix = Matrix(torch.zeros(50, 70), torch.zeros(50, 70))
    found = mean_of_cut(matrix, LowRank(left, right), matrix.buffer())
    torch.testing.assert_close(found, -product[product < 0].mean())
    assert float(mean_of_cut(matrix, LowRank(left.abs(), right.abs()), matrix.buffer())) == 1.0


def test_rows_that_never_get_a_gradient_stay() -> None:
    """As the embeddings of unseen tokens do: nothing is put in the place of an exact zero."""
    parameter = nn.Parameter(torch.ones(128, 64))
    optimizer = MLorcAdamW([parameter], lr=0.1)
    source = torch.Generator().manual_seed(0)
    for _ in range(10):
        parameter.grad = torch.zeros(128, 64)
        parameter.grad[:40] = torch.randn(40, 64, generator=source)
        optimizer.step()
    assert torch.equal(parameter[40:], torch.ones(88, 64))
    assert (parameter[:40] != 1).all()
    assert parameter.isfinite().all()


def test_zero_gradients_change_nothing() -> None:
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = MLorcAdamW([parameter], lr=0.1)
    for _ in range(3):
        parameter.grad = torch.zeros(64, 64)
        optimizer.step()
    assert torch.equal(parameter, torch.ones(64, 64))
    for _ in range(3):
        parameter.grad = torch.ones(64, 64)
        optimizer.step()
    assert parameter.isfinite().all()
    assert (parameter < 1).all()


@pytest.mark.parametrize("optimizer_class", [MLorcAdamW, MLorcLion])
def test_bf16_weights_move_with_stochastic_rounding(optimizer_class: Any) -> None:
    moved = {}
    for rounding in (False, True):
        parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = optimizer_class([parameter], lr=1e-4, stochastic_rounding=rounding)
        for _ in range(50):
            parameter.grad = torch.ones(64, 64, dtype=torch.bfloat16)
            optimizer.step()
        moved[rounding] = float((1 - parameter.float()).mean())
    assert moved[False] == 0.0, "50 steps of 1e-4 from 1 are lost one by one"
    assert moved[True] == pytest.approx(50e-4, rel=0.2)
    left = next(value for key, value in optimizer.state[parameter].items() if key.endswith(".left"))
    assert left.dtype == torch.float32


def test_bf16_factors_cost_little_accuracy() -> None:
    exact = run(MLorcAdamW, (64, 64), rank=8)
    found = run(MLorcAdamW, (64, 64), rank=8, factor_dtype="bf16")
    assert 0 < (found - exact).norm() / exact.norm() < 0.02

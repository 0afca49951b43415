"""The layer's maths against limits, gradcheck, and a straight-line reference with the mask that it never makes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raymem.methods.moram.base import BaseWeight
from raymem.methods.moram.ops import choose_formulation, moram_linear, sampled_dots, selected_delta
from tests.helpers.moram_cases import Case, dense_reference, random_case

pytestmark = pytest.mark.numerics

FORMULATIONS = ("fast", "frugal")


def run(case: Case, formulation: Any, base: BaseWeight | None = None) -> list[torch.Tensor]:
    """Output, then gradients of x, A, B and the bias."""
    leaves = [case.x, case.factor_A_RI, case.factor_B_OR, *([] if case.bias_O is None else [case.bias_O])]
    for leaf in leaves:
        leaf.grad = None
    y = moram_linear(
        case.x, case.index_OK, case.factor_A_RI, case.factor_B_OR, scale=case.scale,
        base=base or BaseWeight(case.weight_OI), bias_O=case.bias_O, formulation=formulation,
    )  # fmt: skip
    y.backward(case.grad_y)
    return [y, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    """Relative in the Frobenius norm, each tensor for itself."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error <= tolerance, f"{error:.2e}"


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize(
    ("outputs", "inputs", "k", "bias"),
    [(7, 5, 2, True), (5, 9, 9, True), (6, 4, 1, False), (1, 1, 1, True), (2, 3, 2, False)],
)
def test_gradcheck_in_double(formulation: Any, outputs: int, inputs: int, k: int, bias: bool) -> None:
    case = random_case(outputs, inputs, k, bias=bias, dtype=torch.float64, tokens=(2, 3))

    def layer(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        base = BaseWeight(case.weight_OI)
        return moram_linear(x, case.index_OK, A, B, scale=0.7, base=base, bias_O=b, formulation=formulation)

    checked: Any = (case.x, case.factor_A_RI, case.factor_B_OR, case.bias_O)  # None among them is allowed
    assert torch.autograd.gradcheck(layer, checked)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("tokens", [(1,), (2, 7), (3, 2, 130), (300,)], ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs", "k"), [(33, 20, 5), (20, 65, 1), (64, 64, 64), (200, 310, 9), (3, 500, 17)]
)
def test_equals_a_dense_mask(formulation: Any, tokens: tuple[int, ...], outputs: int, inputs: int, k: int) -> None:
    for bias in (True, False):
        case = random_case(outputs, inputs, k, tokens=tokens, bias=bias, seed=outputs + k)
        assert_near(run(case, formulation), dense_reference(case), 2e-6)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 6, 40])
def test_equals_a_dense_mask_in_bf16(formulation: Any, factors: torch.dtype, k: int) -> None:
    case = random_case(48, 40, k, dtype=torch.bfloat16, factor_dtype=factors, tokens=(2, 150))
    found = run(case, formulation)
    assert [value.dtype for value in found[:4]] == [torch.bfloat16, torch.bfloat16, factors, factors]
    assert_near(found, dense_reference(case), 1e-2)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_all_connections_are_a_low_rank_update(formulation: Any) -> None:
    case = random_case(48, 32, 32, rank=5, tokens=(4, 60))
    found = run(case, formulation)
    assert case.bias_O is not None
    x, A, B, bias = (
        value.detach().clone().requires_grad_() for value in (case.x, case.factor_A_RI, case.factor_B_OR, case.bias_O)
    )
    y = F.linear(x, case.weight_OI, bias) + F.linear(F.linear(x, A), B) * case.scale  # LoRA
    y.backward(case.grad_y)
    gradients = [value.grad for value in (x, A, B, bias) if value.grad is not None]
    assert_near(found, [y, *gradients], 2e-6)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_a_weight_stored_transposed_is_read_as_it_is(formulation: Any) -> None:
    case = random_case(30, 20, 4)
    transposed = BaseWeight(case.weight_OI.mT.contiguous(), transposed=True)
    assert_near(run(case, formulation, transposed), dense_reference(case), 2e-6)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("inputs", [64, 96, 40])
def test_a_4bit_weight_is_read_by_rows(formulation: Any, nested: bool, inputs: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    case = random_case(256, inputs, 4)
    packed = bnb.nn.Params4bit(case.weight_OI, requires_grad=False, quant_type="nf4", compress_statistics=nested).to(
        "cpu"
    )
    blocks = copy.copy(packed.quant_state)
    blocks.shape = (256 * inputs // 64, 64)  # on CPUs bitsandbytes misreads rows that end inside a block
    case.weight_OI = bnb.functional.dequantize_4bit(packed.data, blocks).view(256, inputs)
    assert_near(run(case, formulation, BaseWeight(packed, quant_state=packed.quant_state)), dense_reference(case), 2e-6)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_without_a_weight_it_is_the_update_alone(formulation: Any) -> None:
    case = random_case(30, 20, 4, bias=False)
    case.weight_OI = torch.zeros_like(case.weight_OI)
    assert_near(run(case, formulation, BaseWeight(None)), dense_reference(case), 2e-6)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_no_tokens_give_no_output_and_zero_gradients(formulation: Any) -> None:
    case = random_case(6, 5, 2, tokens=(0,))
    y, grad_x, grad_A, grad_B, grad_bias = run(case, formulation)
    assert y.shape == (0, 6)
    assert grad_x.shape == (0, 5)
    assert not grad_A.any() and not grad_B.any() and not grad_bias.any()


def test_only_wanted_gradients_are_made() -> None:
    case = random_case(6, 5, 2)
    for wanted in ("x", "factor_A_RI", "factor_B_OR"):
        for name in ("x", "factor_A_RI", "factor_B_OR", "bias_O"):
            getattr(case, name).requires_grad_(name == wanted)
        run(case, "fast")
        for name in ("x", "factor_A_RI", "factor_B_OR", "bias_O"):
            assert (getattr(case, name).grad is not None) == (name == wanted)


def test_sampled_dots_are_the_entries_of_the_dense_gradient() -> None:
    case = random_case(40, 30, 6, tokens=(700,))
    dense_OI = case.grad_y.double().mT @ case.x.detach().double()
    found = sampled_dots(case.grad_y, case.x.detach(), case.index_OK)
    torch.testing.assert_close(found.double(), dense_OI.gather(1, case.index_OK.long()), rtol=1e-5, atol=1e-4)


def test_the_selected_update_is_that_of_the_dense_one() -> None:
    case = random_case(50, 30, 7)
    dense_OI = case.scale * (case.factor_B_OR @ case.factor_A_RI).detach()
    found = selected_delta(case.index_OK, case.factor_A_RI, case.factor_B_OR, case.scale)
    torch.testing.assert_close(found, dense_OI.gather(1, case.index_OK.long()))


def test_the_global_random_stream_is_untouched() -> None:
    case = random_case(6, 5, 2)
    before = torch.get_rng_state()
    run(case, "fast")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("density", "dtype", "device", "save_memory", "chosen"),
    [
        (0.01, torch.float32, "cpu", False, "fast"),
        (0.03, torch.float32, "cpu", False, "fast"),
        (0.2, torch.float32, "cpu", False, "frugal"),
        (0.01, torch.bfloat16, "cpu", False, "fast"),
        (0.04, torch.bfloat16, "cpu", False, "frugal"),
        (0.01, torch.float32, "cuda", False, "frugal"),
        (0.01, torch.float32, "cpu", True, "frugal"),
    ],
)
def test_the_formulation_follows_density_dtype_and_device(
    density: float, dtype: torch.dtype, device: str, save_memory: bool, chosen: str
) -> None:
    assert choose_formulation(density, dtype, device, save_memory=save_memory) == chosen


def test_a_second_derivative_is_refused() -> None:
    case = random_case(6, 5, 2)
    y = moram_linear(
        case.x, case.index_OK, case.factor_A_RI, case.factor_B_OR, scale=1.0, base=BaseWeight(case.weight_OI)
    )
    (gradient,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_layer_of_nn_matches_when_nothing_is_learned() -> None:
    """B = 0: the layer is the frozen one, bit for bit up to the order of its chunks."""
    linear, case = nn.Linear(20, 30), random_case(30, 20, 4)
    with torch.no_grad():
        case.factor_B_OR.zero_()
    base = BaseWeight(linear.weight.detach())
    found = moram_linear(
        case.x, case.index_OK, case.factor_A_RI, case.factor_B_OR, scale=1.0, base=base, bias_O=linear.bias
    )
    torch.testing.assert_close(found, linear(case.x))

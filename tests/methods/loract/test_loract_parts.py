"""The parts against straight-line derivations: norms, gates, sharing of factors, automatic ranks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from raymem.linalg import LowRank, row_sampled_qb
from raymem.methods.layers.gated_mlp import is_gated_mlp
from raymem.methods.layers.norms import NormForm, NormFunction, recognise
from raymem.methods.layers.saved import Factors, Raw, Saved
from raymem.methods.loract import compress_activations
from raymem.methods.loract.auto_rank import candidate_ranks
from raymem.methods.loract.packer import Packer, Site
from raymem.seeds import generator
from tests.helpers.loract_families import WIDTH, batch, build, difference, gradients


def make_packer(**options: Any) -> Packer:
    return Packer(**{"power_iterations": 1, "seed": 0, "report_every": 0, "side_stream": False, **options})


def norms() -> dict[str, tuple[nn.Module, NormForm | None]]:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    class HalfNorm(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 0.5

    hidden = nn.LayerNorm(8)
    hidden.weight.data[3] = 0
    return {
        "llama": (LlamaRMSNorm(8, eps=1e-6), NormForm(False, 0.0, 1e-6)),
        "t5": (T5LayerNorm(8), NormForm(False, 0.0, 1e-6)),
        "gemma": (GemmaRMSNorm(8), NormForm(False, 1.0, 1e-6)),
        "layer norm": (nn.LayerNorm(8), NormForm(True, 0.0, 1e-5)),
        "no weight": (nn.LayerNorm(8, elementwise_affine=False), NormForm(True, 0.0, 1e-5)),
        "torch rms": (nn.RMSNorm(8, eps=1e-5), NormForm(False, 0.0, 1e-5)),
        "meta": (LlamaRMSNorm(8).to("meta"), NormForm(False, 0.0, 1e-6)),
        "another formula": (HalfNorm(8), None),
        "another width": (nn.LayerNorm(16), None),
        "a feature with weight 0": (hidden, None),
        "no norm": (nn.Linear(8, 8), None),
    }


@pytest.mark.parametrize("name", list(norms()))
def test_norms_are_known_by_what_they_compute(name: str) -> None:
    module, expected = norms()[name]
    assert recognise(module, 8) == expected


@pytest.mark.parametrize("centred", [True, False])
def test_the_backward_pass_of_a_norm_from_its_output(centred: bool) -> None:
    source = generator(0, "norm")
    x, grad, bias = (torch.randn(shape, generator=source) for shape in ((2, 3, 8), (2, 3, 8), (8,)))
    weight = 1 + 0.3 * torch.randn(8, generator=source)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def compute(x: torch.Tensor) -> torch.Tensor:
        centre = x.mean(-1, keepdim=True) if centred else 0.0
        variance = (x - centre).square().mean(-1, keepdim=True)
        return (x - centre) / torch.sqrt(variance + 1e-5) * weight + bias

    y = NormFunction.apply(
        x, weight, bias, NormForm(centred, 0.0, 1e-5), compute, lambda y: Saved(Raw(y), y.shape)
    )  # fmt: skip
    assert torch.equal(y, compute(x))
    expected = torch.autograd.grad(compute(x), leaves, grad)
    for found, wanted in zip(torch.autograd.grad(y, leaves, grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_gated_mlps_are_known_by_what_they_compute() -> None:
    llama, gemma, bert = build("llama"), build("gemma3_text"), build("bert")
    assert [name for name, module in llama.named_modules() if is_gated_mlp(module)] == [
        f"model.layers.{index}.mlp" for index in range(3)
    ]
    assert not any(is_gated_mlp(module) for module in gemma.modules()), "its gate is no SiLU"
    assert not any(is_gated_mlp(module) for module in bert.modules())


def test_the_factors_are_those_of_the_paper() -> None:
    """Y = A A_S^T, Q = orth(Y), B = Q^T A, on the side with fewer rows, written out in double precision."""
    source = generator(0, "activations")
    tall_TN = torch.randn(96, 24, generator=source) / torch.arange(1, 25)
    for matrix in (tall_TN, tall_TN.mT):
        found = row_sampled_qb(matrix, 6, generator(0, "sketch"))
        short = (matrix if matrix.shape[0] < matrix.shape[1] else matrix.mT).double()
        rows = torch.randperm(24, generator=generator(0, "sketch"))[:6]
        basis, _ = torch.linalg.qr(short @ short[rows].mT)
        product = basis @ (basis.mT @ short)
        expected = product if matrix.shape[0] < matrix.shape[1] else product.mT
        torch.testing.assert_close(found.reconstruct().double(), expected, rtol=1e-4, atol=1e-4)


def test_views_of_one_value_share_its_factors_and_writes_end_that() -> None:
    packer, site = make_packer(), Site("a", 16, 4)
    x = torch.randn(2, 32, 4) @ torch.randn(4, 16)
    first = packer.pack(x, site)
    assert packer.pack(x.view(64, 16), site).held is first.held
    assert packer.keep(x[:]).held is first.held
    assert packer.pack(x[:, :16], site).held is not first.held
    before = first.unpack().clone()
    x.mul_(2)
    second = packer.pack(x, site)
    assert second.held is not first.held, "the old factors are of the old values"
    torch.testing.assert_close(second.unpack(), 2 * before)
    assert torch.equal(first.unpack(), before)


def test_freed_storage_is_never_mistaken_for_what_it_held() -> None:
    packer, site = make_packer(), Site("a", 16, 4)
    saved = []
    addresses = set()
    for value in range(50):
        x = torch.full((64, 16), float(value))
        addresses.add(x.data_ptr())
        saved.append(packer.pack(x, site))
        del x
    assert len(addresses) < 50, "the allocator does hand out the same memory again"
    for value, one in enumerate(saved):
        torch.testing.assert_close(one.unpack(), torch.full((64, 16), float(value)), rtol=1e-3, atol=1e-3)


def test_a_tensor_that_is_kept_raw_must_not_change_before_backward() -> None:
    packer = make_packer()
    x = torch.randn(4, 16)
    saved = packer.pack(x, Site("a", 16, 4))
    assert packer.report.raw == {"short": 1}
    x.add_(1)
    with pytest.raises(RuntimeError, match="was changed in place"):
        saved.unpack()


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(64, 16, dtype=torch.int64), "kind"),
        (torch.zeros(64, 7), "narrow"),
        (torch.zeros(4, 16), "short"),
        (torch.zeros(64), "kind"),
        (torch.eye(16).to_sparse(), "kind"),
    ],
)
def test_what_stays_raw(tensor: torch.Tensor, reason: str) -> None:
    packer = make_packer()
    packer.pack(tensor, Site("a", 16, 4))
    assert packer.report.raw == {reason: 1}
    assert packer.report.compressed == 0


def test_factors_give_way_to_the_tensor_where_exact_values_are_needed() -> None:
    packer = make_packer()
    x = torch.randn(64, 16)
    first = packer.pack(x, Site("norm", 16, 4))
    second = packer.pack(x, Site("experts", 16, 4, exact=True))
    assert torch.equal(first.unpack(), x) and torch.equal(second.unpack(), x)
    assert packer.report.held_bytes == x.numel() * 4
    assert (packer.report.compressed, packer.report.raw) == (0, {"moe": 1})


def test_restoring_is_not_touched_by_autocast() -> None:
    factors = Factors(LowRank(torch.randn(8, 2), torch.randn(2, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert factors.restore().dtype == torch.float32


def test_wide_tensors_get_rank_in_proportion() -> None:
    site = Site("a", 16, 4)
    assert [site.rank_of(n) for n in (8, 16, 40)] == [4, 4, 10]
    assert Site("gate", 16, 4, of_inputs=True).rank_of(40) == 4
    assert Site("gate", 16, 16, of_inputs=True).rank_of(40) == 40, "full rank is exact everywhere"


def test_candidates_rise_evenly_to_the_highest_rank() -> None:
    assert candidate_ranks(5) == [1, 2, 3, 4, 5]
    assert candidate_ranks(64) == list(range(4, 65, 4))
    assert candidate_ranks(100)[-1] == 100 and len(candidate_ranks(100)) == 16


def test_automatic_ranks_are_the_smallest_under_the_tolerance() -> None:
    model, inputs = build("llama"), batch()
    options: dict[str, Any] = {"rank": "auto", "max_rank": WIDTH, "first_input": "compressed", "report_every": 1}
    chosen = []
    for tolerance in (0.5, 0.2):
        with compress_activations(model, tolerance=tolerance, **options) as handle:
            handle.begin_step(0)
            state = torch.get_rng_state()
            assert set(handle.ranks.values()) == {WIDTH}
            with handle.calibration():
                model(**inputs)
            assert torch.equal(torch.get_rng_state(), state)
            ranks = handle.ranks
            chosen.append(sum(ranks.values()))
            model(**inputs).loss.backward()
            errors = handle.errors()
            assert set(errors) == set(ranks)
            assert all(error <= 1.1 * tolerance for error in errors.values()), "dropout differs, so not to the digit"
            handle.set_ranks({name: max(1, rank - 4) for name, rank in ranks.items()})
            model(**inputs).loss.backward()
            assert all(error > 0.9 * tolerance for error in handle.errors().values())
    assert chosen[0] < chosen[1] < 3 * WIDTH


def test_the_error_that_is_reported_is_that_of_the_factors() -> None:
    packer = make_packer(report_every=2)
    x = torch.randn(64, 16)
    for step in range(3):
        packer.step = step
        saved = packer.pack(x, Site("a", 16, 4))
        missed = float((x - saved.unpack()).norm() / x.norm())
        del saved
        if step != 1:
            assert float(packer.errors.pop("a")) == pytest.approx(missed, rel=1e-4)
    assert packer.errors == {}
    assert math.isclose(missed, 0.7, abs_tol=0.2)


def test_a_copy_of_the_model_compresses_for_itself() -> None:
    model, inputs = build("llama"), batch()
    with compress_activations(model, rank=4, first_input="compressed") as handle:
        handle.begin_step(0)
        _, expected = gradients(model, inputs)
        model.zero_grad()
        twin = copy.deepcopy(model)
        handle.remove()
        _, found = gradients(twin, inputs)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert difference(found, expected) == 0

"""Orthonormal bases, range finders and truncation against the exact singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch

from raymem.linalg import (
    LowRank,
    expand_rows,
    leading_directions,
    orthonormalize,
    row_chunks,
    row_sampled_qb,
    whitening,
)
from raymem.linalg.orthonormal import cholesky, cholesky_qr
from raymem.seeds import generator

pytestmark = pytest.mark.numerics

EYE_5 = torch.eye(5)


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A random matrix whose singular values fall like 1/i."""
    source = generator(seed, "matrix")
    left, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=source))
    right, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=source))
    return left / torch.arange(1, min(rows, columns) + 1) @ right.mT


def relative_error(matrix: torch.Tensor, factors: LowRank) -> float:
    return float((matrix - factors.reconstruct()).norm() / matrix.norm())


def best_error(matrix: torch.Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(matrix)
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("basis", [orthonormalize, cholesky_qr])
def test_a_basis_is_orthonormal_and_spans_badly_conditioned_columns(basis: object) -> None:
    tall = torch.randn(300, 5, generator=generator(0)) * torch.logspace(0, -12, 5)
    tall[:, 1] += tall[:, 0]
    found = basis(tall)  # type: ignore[operator]
    torch.testing.assert_close(found.mT @ found, EYE_5, atol=1e-5, rtol=0)
    torch.testing.assert_close(found @ (found.mT @ tall), tall, atol=1e-5, rtol=1e-4)


def test_cholesky_survives_an_indefinite_gram_matrix() -> None:
    gram = EYE_5.clone()
    gram[0, 1] = gram[1, 0] = 1.001
    assert int(torch.linalg.cholesky_ex(gram).info) != 0
    assert cholesky(gram).isfinite().all()
    assert cholesky(torch.stack([gram, EYE_5]))[1].allclose(EYE_5, atol=1e-5), "only the one that failed is shifted"


def test_dependent_and_zero_columns_give_finite_bases() -> None:
    tall = torch.randn(50, 3, generator=generator(0))
    tall = torch.cat([tall, tall[:, :1], torch.zeros(50, 1)], dim=1)
    for found in (orthonormalize(tall), cholesky_qr(tall), tall @ whitening(tall.double().mT @ tall.double())):
        assert found.isfinite().all()
        torch.testing.assert_close(found @ (found.mT @ tall), tall, atol=2e-4, rtol=0)


def test_whitening_orthonormalises_what_is_only_known_by_its_gram_matrix() -> None:
    tall = torch.randn(300, 5, generator=generator(0)) * torch.logspace(0, -8, 5)
    found = tall @ whitening(tall.double().mT @ tall.double())
    torch.testing.assert_close(found.mT @ found, EYE_5, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_more_work_comes_closer_to_the_best_rank(shape: tuple[int, int]) -> None:
    matrix = decaying(*shape)
    best = best_error(matrix, 8)
    errors = [relative_error(matrix, row_sampled_qb(matrix, 8, generator(1), n)) for n in (0, 1, 2)]
    assert 1.6 * best > errors[0] > errors[1] > errors[2] > 0.999 * best
    assert errors[1] < 1.1 * best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_rank_is_exact_up_to_the_dtype(dtype: torch.dtype) -> None:
    matrix = decaying(24, 16).to(dtype)
    for one in (matrix, matrix.mT):
        factors = row_sampled_qb(one, 16, generator(1))
        assert relative_error(one.float(), factors) < 20 * torch.finfo(dtype).eps
        assert factors.left_MR.dtype == factors.right_RN.dtype == dtype


@pytest.mark.parametrize("power_iterations", [0, 1])
def test_half_precision_comes_as_close_as_full_precision(power_iterations: int) -> None:
    matrix = decaying(256, 128)
    exact, half = (row_sampled_qb(a, 16, generator(1), power_iterations) for a in (matrix, matrix.bfloat16()))
    assert relative_error(matrix, half) < 1.05 * relative_error(matrix, exact)


def test_leading_directions_give_the_best_truncation() -> None:
    matrix = decaying(30, 40)
    full = row_sampled_qb(matrix, 30, generator(1))  # the left factor of a wide matrix is orthonormal
    directions = leading_directions(full.right_RN, 6)
    cut = LowRank(full.left_MR @ directions, directions.mT @ full.right_RN)
    assert cut.rank == 6
    assert relative_error(matrix, cut) == pytest.approx(best_error(matrix, 6), rel=1e-4)


def test_sketches_repeat_and_leave_the_global_stream_alone() -> None:
    matrix = decaying(20, 20)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = (row_sampled_qb(matrix, 4, generator(3, "a")) for _ in range(2))
    assert torch.equal(first.right_RN, second.right_RN)
    assert torch.equal(torch.rand(1), expected)


def test_shape_and_bytes_of_factors() -> None:
    factors = LowRank(torch.randn(10, 3), torch.randn(3, 7))
    assert factors.shape == (10, 7)
    assert factors.num_bytes == 4 * 3 * (10 + 7)
    torch.testing.assert_close(factors.reconstruct()[2:5], factors.left_MR[2:5] @ factors.right_RN)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(16, 1024, 4), (12, 1024, 4), (16, 1000, 4), (16, 1024, 32)])
def test_rows_of_a_product_are_what_a_product_is(rows: int, columns: int, rank: int) -> None:
    """Whichever way it is taken: eight rows at a time where they would alias in the cache, or all at once."""
    left_CR, right_RN = torch.randn(rows, rank), torch.randn(rank, columns)
    out_CN = torch.full((rows + 3, columns), math.nan)
    found = expand_rows(left_CR, right_RN, out_CN[:rows])
    assert found.data_ptr() == out_CN.data_ptr() and bool(out_CN[rows:].isnan().all())
    torch.testing.assert_close(found.double(), left_CR.double() @ right_RN.double(), rtol=1e-5, atol=1e-5)


def test_chunks_cover_every_row_once() -> None:
    chunks = list(row_chunks(100, row_bytes=40, chunk_bytes=1200))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(100))
    assert {chunk.stop - chunk.start for chunk in chunks} == {24, 4}
    assert list(row_chunks(5, row_bytes=10**9, chunk_bytes=1)) == [slice(0, 5)]

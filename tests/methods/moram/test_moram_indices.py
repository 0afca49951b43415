"""Index sets: deterministic choice, and storage that is exact and small."""

from __future__ import annotations

import pytest
import torch

from raymem.methods.moram.indices import pack_indices, packed_bytes_per_row, top_columns, unpack_indices, valid

SHAPES = [(5, 16, 3), (7, 16, 16), (3, 1, 1), (4, 1000, 1), (9, 1024, 31), (6, 33, 32), (40, 4096, 128), (2, 2, 1)]


@pytest.mark.parametrize(("outputs", "inputs", "k"), SHAPES)
def test_of_equal_scores_the_leftmost_columns_win(outputs: int, inputs: int, k: int) -> None:
    score = torch.randint(0, 4, (outputs, inputs), generator=torch.Generator().manual_seed(k)).float()
    expected = score.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    found = top_columns(score, k)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)


def test_infinite_scores_come_first() -> None:
    score = torch.tensor([[1.0, float("inf"), 3.0, float("inf")]])
    assert top_columns(score, 3).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("outputs", "inputs", "k"), SHAPES)
def test_packing_is_exact_and_of_known_size(outputs: int, inputs: int, k: int) -> None:
    index = top_columns(torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(0)), k)
    packed = pack_indices(index, inputs)
    assert packed.dtype == torch.uint8
    assert packed.shape == (outputs, packed_bytes_per_row(k, inputs))
    assert torch.equal(unpack_indices(packed, k, inputs), index)


@pytest.mark.parametrize("columns", ["first", "last"])
def test_the_corners_of_a_row_are_packed_exactly(columns: str) -> None:
    inputs, k = 1000, 7
    start = 0 if columns == "first" else inputs - k
    index = torch.arange(start, start + k, dtype=torch.int32)[None]
    assert torch.equal(unpack_indices(pack_indices(index, inputs), k, inputs), index)


def test_packed_indices_take_a_fraction_of_int32() -> None:
    for inputs, k, most_bits in [(4096, 16, 11), (4096, 128, 7.2), (1024, 32, 7.3), (512, 512, 2.2)]:
        assert 8 * packed_bytes_per_row(k, inputs) / k < most_bits


def test_a_damaged_code_is_refused() -> None:
    packed = pack_indices(top_columns(torch.rand(4, 100), 9), 100)
    with pytest.raises(ValueError, match="damaged"):
        unpack_indices(torch.zeros_like(packed), 9, 100)
    with pytest.raises(ValueError, match="damaged"):
        unpack_indices(torch.full_like(packed, 255), 9, 100)


def test_what_is_no_index_set_is_seen() -> None:
    assert valid(torch.tensor([[0, 3, 9]]), 10)
    for wrong in ([[-1, 3, 9]], [[0, 3, 10]], [[3, 3, 9]], [[9, 3, 0]]):
        assert not valid(torch.tensor(wrong), 10)

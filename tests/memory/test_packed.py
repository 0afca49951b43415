"""A packed weight is what bitsandbytes makes of it, bit for bit, in one tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from raymem.memory import packed
from raymem.memory.packed import PackedLinear, Packing

bnb = pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def quantised(matrix: torch.Tensor) -> tuple[torch.Tensor, Any]:
    found: tuple[torch.Tensor, Any] = bnb.functional.quantize_4bit(
        matrix, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return found


@pytest.mark.parametrize(("rows", "columns"), [(24, 128), (10, 96), (300, 64), (3, 10)])
def test_one_matrix_is_read_as_bitsandbytes_wrote_it(rows: int, columns: int) -> None:
    matrix = weight(rows, columns)
    packing = Packing((rows, columns), torch.bfloat16)
    codes, state = packing.unpack(packing.pack(matrix, CPU))
    expected_codes, expected = quantised(matrix)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(
        bnb.functional.dequantize_4bit(codes, state), bnb.functional.dequantize_4bit(expected_codes, expected)
    )
    x = weight(5, columns)
    assert torch.equal(
        bnb.matmul_4bit(x, codes, quant_state=state), bnb.matmul_4bit(x, expected_codes, quant_state=expected)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [1, 32 << 20])
def test_experts_are_quantised_one_by_one(
    dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_CHUNK_BYTES", chunk_bytes)
    experts = weight(5, 12, 48, dtype=dtype) * torch.tensor([1, 10, 0.1, 3, 100], dtype=dtype)[:, None, None]
    packing = Packing((5, 12, 48), dtype)
    found = packing.dequantise(packing.pack(experts, CPU))
    assert found.dtype == dtype
    for expert, values in zip(experts, found, strict=True):
        assert torch.equal(values, bnb.functional.dequantize_4bit(*quantised(expert)))


def test_a_packed_weight_has_a_quarter_of_the_bytes() -> None:
    experts, rows, columns = 8, 512, 256
    weights = experts * rows * columns
    blocks = rows * columns // 64
    scales = experts * (blocks + 4 * math.ceil(blocks / 256) + 4)
    packing = Packing((experts, rows, columns), torch.bfloat16)
    assert packing.num_bytes == weights // 2 + scales + 4 * (16 + 256)
    assert packing.placeholder().nbytes == packing.num_bytes
    assert packing.num_bytes < 0.26 * 2 * weights


@pytest.mark.parametrize("columns", [96, 128])
def test_a_packed_layer_computes_what_bitsandbytes_does(columns: int) -> None:
    matrix, bias = weight(40, columns), weight(40)
    packing = Packing((40, columns), torch.bfloat16)
    ours = PackedLinear(columns, 40, True, torch.bfloat16, planned=False)
    ours.weight = nn.Parameter(packing.pack(matrix, CPU), requires_grad=False)
    theirs = bnb.nn.Linear4bit(columns, 40, True, torch.bfloat16, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(matrix, requires_grad=False, quant_type="nf4", module=theirs).to("cpu")
    ours.bias = theirs.bias = nn.Parameter(bias, requires_grad=False)
    inputs = [weight(7, columns).requires_grad_() for _ in range(2)]
    found, expected = ours(inputs[0]), theirs(inputs[1])
    assert torch.equal(found, expected)
    for output in (found, expected):
        output.backward(weight(7, 40))
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)

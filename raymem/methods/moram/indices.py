"""The index set: choosing the K best columns of every row, and storing them in few bits.

In memory a set is an int32 tensor [O, K], ascending within each row. In a file it is Elias-Fano coded (Elias 1974,
Fano 1971): of each index the low ``L = floor(log2(I / K))`` bits are stored as they are; the high bits of a row are a
bit string in which the i-th one stands at position ``high_i + i``. A row then takes ``K L + K + (I >> L)`` bits, about
``2 + log2(I / K)`` per index whatever the values, so that the size of a stored tensor follows from its shape.
"""

from __future__ import annotations

import torch

# O outputs (rows), I inputs (columns), K kept columns per row, L low bits, H bits of the high part of a row

_ROWS_AT_ONCE_BYTES = 1 << 20
_BITS_8 = tuple(1 << i for i in range(8))


def rows_at_once(row_bytes: int, chunk_bytes: int = _ROWS_AT_ONCE_BYTES) -> int:
    """Return how many rows fit into a chunk; at least one."""
    return max(1, chunk_bytes // max(1, row_bytes))


def top_columns(score_OI: torch.Tensor, k: int) -> torch.Tensor:
    """Return the ``k`` columns of highest score of every row; of equal scores the leftmost ones.

    Args:
        score_OI: any real dtype, no NaN.

    Returns:
        int32 [O, K], ascending within a row; the same on every device and for any number of threads.
    """
    outputs, inputs = score_OI.shape
    index_OK = torch.empty(outputs, k, dtype=torch.int32, device=score_OI.device)
    step = rows_at_once(16 * inputs)
    for start in range(0, outputs, step):
        score = score_OI[start : start + step]
        threshold = score.topk(k, dim=1).values[:, -1:]
        above, equal = score > threshold, score == threshold
        missing = k - above.sum(1, keepdim=True, dtype=torch.int32)
        chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))
        index_OK[start : start + step] = chosen.nonzero()[:, 1].view(-1, k)
    return index_OK


def _layout(k: int, inputs: int) -> tuple[int, int]:
    """Low bits L per index and bits H of the high part of a row."""
    low_bits = max(0, (inputs // k).bit_length() - 1)
    return low_bits, k + (inputs >> low_bits) + 1


def packed_bytes_per_row(k: int, inputs: int) -> int:
    """Width of the stored tensor."""
    low_bits, high_bits = _layout(k, inputs)
    return -(-(k * low_bits + high_bits) // 8)


def pack_indices(index_OK: torch.Tensor, inputs: int) -> torch.Tensor:
    """Elias-Fano code of a sorted index set.

    Args:
        index_OK: int32, strictly ascending within each row, values in [0, ``inputs``).

    Returns:
        uint8 [O, packed_bytes_per_row(K, inputs)] on the host.
    """
    outputs, k = index_OK.shape
    low_bits, high_bits = _layout(k, inputs)
    packed = torch.empty(outputs, packed_bytes_per_row(k, inputs), dtype=torch.uint8)
    position_K = torch.arange(k)
    step = rows_at_once(16 * (k * low_bits + high_bits + 8))
    for start in range(0, outputs, step):
        index = index_OK[start : start + step].cpu().long()
        bits = torch.zeros(len(index), 8 * packed.shape[1], dtype=torch.uint8)
        for bit in range(low_bits):
            bits[:, bit : k * low_bits : low_bits] = (index >> bit) & 1
        bits[:, k * low_bits :].scatter_(1, (index >> low_bits) + position_K, 1)
        weights = torch.tensor(_BITS_8, dtype=torch.uint8)
        packed[start : start + step] = (bits.view(len(index), -1, 8) * weights).sum(2, dtype=torch.uint8)
    return packed


def unpack_indices(packed: torch.Tensor, k: int, inputs: int) -> torch.Tensor:
    """Return the inverse of :func:`pack_indices`.

    Returns:
        int32 [O, K] on the device of ``packed``.

    Raises:
        ValueError: the code is damaged (another number of indices in a row, or one outside the layer).
    """
    low_bits, _ = _layout(k, inputs)
    index_OK = torch.empty(len(packed), k, dtype=torch.int32, device=packed.device)
    position_K = torch.arange(k, device=packed.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    step = rows_at_once(24 * 8 * packed.shape[1])
    for start in range(0, len(packed), step):
        bits = ((packed[start : start + step, :, None] >> shifts) & 1).flatten(1)
        ones = bits[:, k * low_bits :].bool()
        if not bool((ones.sum(1) == k).all()):
            raise ValueError("the stored index set is damaged: a row does not hold as many indices as it should")
        index = (ones.nonzero()[:, 1].view(-1, k) - position_K) << low_bits
        for bit in range(low_bits):
            index |= bits[:, bit : k * low_bits : low_bits].long() << bit
        if not valid(index, inputs):
            raise ValueError("the stored index set is damaged: an index lies outside the layer, or is there twice")
        index_OK[start : start + step] = index
    return index_OK


def valid(index_OK: torch.Tensor, inputs: int) -> bool:
    """Say whether every row is strictly ascending within [0, ``inputs``)."""
    inside = bool((index_OK[:, 0] >= 0).all()) and bool((index_OK[:, -1] < inputs).all())
    return inside and bool((index_OK[:, 1:] > index_OK[:, :-1]).all())

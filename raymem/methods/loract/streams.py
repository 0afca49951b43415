"""Compression on a CUDA stream of its own, so that it runs beside the rest of the forward pass.

No CUDA device was at hand where this was written: the path is kept apart from everything else and has not been run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from raymem.linalg import LowRank

# T tokens, N features


def compress_beside(matrix_TN: torch.Tensor, work: Callable[[], LowRank]) -> tuple[LowRank, torch.cuda.Event]:
    """Run ``work``, which reads ``matrix_TN``, on the side stream of its device.

    Returns:
        The factors, and the event behind which a stream may read them. The matrix may be freed at once: the allocator
        waits for the side stream before it hands the memory out again.
    """
    device = matrix_TN.device
    stream = _side_stream(device.index)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        low_rank = work()
    matrix_TN.record_stream(stream)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record(stream)
    return low_rank, ready


@functools.cache
def _side_stream(device_index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device_index)  # type: ignore[no-untyped-call]

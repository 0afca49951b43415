"""The meter against peaks that can be worked out by hand."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from raymem.memory.meter import PeakMeter, resident_tensors, storage_bytes
from raymem.testing import heap_in_use_bytes
from tests.helpers.support import in_processes

CPU = torch.device("cpu")
KIB = 1024
FLOATS = 256  # of one KiB


def test_the_peak_of_a_known_sequence() -> None:
    """10 KiB are resident; +8, +16, -8, +4: the highest sum is 24 above, the last one 20."""
    resident = torch.zeros(10 * FLOATS)
    with PeakMeter(CPU, lambda: [resident]) as meter:
        first = torch.empty(8 * FLOATS)
        second = torch.empty(16 * FLOATS)
        del first
        third = torch.empty(4 * FLOATS)
    assert meter.peak is not None
    assert meter.peak.allocated_bytes == (10 + 8 + 16) * KIB
    assert meter.peak.reserved_bytes is None
    del second, third


def test_what_is_allocated_and_freed_inside_makes_room() -> None:
    kept = torch.zeros(4 * FLOATS)
    with PeakMeter(CPU, lambda: [kept]) as meter:
        torch.empty(12 * FLOATS)
        torch.empty(10 * FLOATS)
    assert meter.peak is not None
    assert meter.peak.allocated_bytes == (4 + 12) * KIB


def test_what_was_there_before_counts_to_the_end() -> None:
    """Whether or not its address belonged to a block of an earlier window, whose size torch remembers."""
    reused = False
    for _ in range(4):
        with PeakMeter(CPU, lambda: []):
            earlier = torch.empty(12 * FLOATS)
        address = earlier.data_ptr()
        del earlier
        dropped = [torch.zeros(12 * FLOATS)]
        reused = reused or dropped[0].data_ptr() == address
        with PeakMeter(CPU, lambda: dropped) as meter:  # noqa: B023
            dropped.clear()
            gc.collect()
            torch.empty(10 * FLOATS)
        assert meter.peak is not None
        assert meter.peak.allocated_bytes == (12 + 10) * KIB, "never too little"
        if reused:
            break


def test_what_another_thread_released_is_gone_once_its_place_is_taken() -> None:
    """The profiler sees only this thread's releases; gloo has threads of its own."""
    blocks: list[torch.Tensor] = []
    places = set()
    with PeakMeter(CPU, list) as meter:
        for _ in range(4):
            blocks.append(torch.empty(1024 * FLOATS))
            places.add(blocks[0].data_ptr())
            thread = threading.Thread(target=blocks.clear)
            thread.start()
            thread.join()
    assert meter.peak is not None
    assert meter.peak.allocated_bytes == len(places) * 1024 * KIB


def test_forward_and_backward_of_a_square() -> None:
    """x [n], y = x * x saves x; then loss, its gradient, dy [n] (expanded: no storage), dx = 2 x dy."""
    x = torch.ones(64 * FLOATS, requires_grad=True)
    with PeakMeter(CPU, lambda: [x]) as meter:
        y = x * x
        y.sum().backward()
    assert meter.peak is not None
    above = meter.peak.allocated_bytes - 64 * KIB
    # y; then dx arrives as two halves that are added: (dy * x) + (dy * x) -> at most three more of its size.
    assert 2 * 64 * KIB <= above <= 4 * 64 * KIB + KIB


def test_temporaries_inside_a_kernel_count() -> None:
    """A strided operand is copied inside the matrix product, where no tensor of Python's ever appears."""
    strided, square = torch.randn(64, 128)[:, ::2], torch.randn(64, 64)
    with PeakMeter(CPU, lambda: []) as meter:
        product = strided @ square
    assert meter.peak is not None
    assert meter.peak.allocated_bytes == 2 * storage_bytes([product])


def test_an_error_inside_passes_and_leaves_no_result() -> None:
    meter = PeakMeter(CPU, lambda: [])
    with pytest.raises(ZeroDivisionError), meter:
        1 / 0  # noqa: B018
    assert meter.peak is None
    with PeakMeter(CPU, lambda: []) as again:  # the profiler was stopped
        torch.empty(FLOATS)
    assert again.peak is not None and again.peak.allocated_bytes == KIB


def test_shared_storages_count_once() -> None:
    base = torch.zeros(8 * FLOATS)
    assert storage_bytes([base, base[: 2 * FLOATS], base.view(8, FLOATS), base]) == 8 * KIB
    assert storage_bytes([base[:1]]) == 8 * KIB, "a view keeps the whole storage alive"
    assert storage_bytes([base, base.clone(), torch.empty(0)]) == 16 * KIB


def test_a_tensor_of_others_has_their_bytes() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    one, other = torch.zeros(2 * FLOATS), torch.zeros(2 * FLOATS)
    assert storage_bytes([TwoTensor(one, other), one]) == one.nbytes + other.nbytes


def test_everything_a_model_keeps_is_resident() -> None:
    model = nn.BatchNorm1d(FLOATS)
    model(torch.randn(4, FLOATS)).sum().backward()
    extra = torch.zeros(FLOATS)
    weights, grads, statistics, count = 2 * KIB, 2 * KIB, 2 * KIB, 8
    assert storage_bytes(resident_tensors(model, [extra])) == weights + grads + statistics + count + KIB


def shard_bytes() -> tuple[int, int]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(torch.zeros(8, FLOATS), mesh, [Shard(0)])
    return storage_bytes([sharded]), storage_bytes([sharded, sharded.to_local()])


def test_of_a_dtensor_the_local_part_counts(tmp_path: Path) -> None:
    for local, twice in in_processes(shard_bytes, 2, tmp_path):
        assert local == twice == 4 * KIB


def test_the_heap_grows_by_what_is_allocated() -> None:
    try:
        before = heap_in_use_bytes()
    except OSError as error:
        pytest.skip(str(error))
    held = torch.empty(64 * 1024 * FLOATS)
    assert heap_in_use_bytes() - before >= 64 * 1024 * KIB
    del held
    assert heap_in_use_bytes() - before < 1024 * KIB

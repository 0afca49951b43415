"""The allocator model: every rule worked out by hand, and invariants over random programs."""

from __future__ import annotations

import itertools
import random

import pytest

from raymem.memory.allocator import (
    GRAIN_BYTES,
    MIB,
    Block,
    CachingAllocator,
    OutOfCapacity,
    replay,
    rounded,
    segment_bytes,
    smallest_capacity,
)


@pytest.mark.parametrize(("asked", "taken"), [(1, 512), (512, 512), (513, 1024), (MIB - 1, MIB), (MIB + 1, MIB + 512)])
def test_requests_are_rounded_to_512_bytes(asked: int, taken: int) -> None:
    assert rounded(asked) == taken


@pytest.mark.parametrize(
    ("request_bytes", "segment"),
    [(512, 2 * MIB), (MIB, 2 * MIB), (MIB + 512, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB),
     (11 * MIB, 12 * MIB), (33 * MIB, 34 * MIB)],
)  # fmt: skip
def test_segment_sizes(request_bytes: int, segment: int) -> None:
    assert segment_bytes(request_bytes) == segment


def test_small_requests_share_a_segment_of_two_mebibytes() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(MIB) for _ in range(2)]
    assert allocator.reserved_bytes == 2 * MIB
    assert blocks[1].address == blocks[0].address + MIB
    allocator.allocate(1)
    assert allocator.reserved_bytes == 4 * MIB


def test_small_and_large_requests_never_share() -> None:
    allocator = CachingAllocator()
    large = allocator.allocate(2 * MIB)
    allocator.free(large)
    allocator.allocate(512)
    assert allocator.reserved_bytes == 20 * MIB + 2 * MIB


def test_a_large_block_is_split_only_if_more_than_a_mebibyte_is_left() -> None:
    allocator = CachingAllocator()
    whole = allocator.allocate(10 * MIB)
    allocator.free(whole)
    assert allocator.allocate(9 * MIB).size_bytes == 10 * MIB, "exactly one MiB would be left"
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(10 * MIB))
    assert allocator.allocate(9 * MIB - 512).size_bytes == 9 * MIB - 512


def test_the_best_fit_at_the_lowest_address_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (14, 12, 12, 16)]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocate(11 * MIB).address == blocks[1].address
    assert allocator.reserved_bytes == (14 + 12 + 12 + 16) * MIB


def test_freed_neighbours_melt_together() -> None:
    allocator = CachingAllocator()
    parts = [allocator.allocate(4 * MIB) for _ in range(5)]
    for index in (0, 2, 4, 1, 3):
        allocator.free(parts[index])
    assert [block.size_bytes for block in allocator.free_blocks()] == [20 * MIB]
    allocator.allocate(9 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_without_capacity_unused_segments_are_given_back_and_the_request_tried_again() -> None:
    allocator = CachingAllocator(capacity_bytes=30 * MIB)
    first = allocator.allocate(12 * MIB)
    allocator.allocate(12 * MIB)
    allocator.free(first)
    allocator.allocate(18 * MIB)
    assert allocator.flushes == 1
    assert allocator.reserved_bytes == 30 * MIB


def test_a_segment_in_use_is_never_given_back() -> None:
    allocator = CachingAllocator(capacity_bytes=40 * MIB)
    kept, freed = allocator.allocate(2 * MIB), allocator.allocate(16 * MIB)
    allocator.free(freed)
    with pytest.raises(OutOfCapacity):
        allocator.allocate(22 * MIB)
    assert kept.in_use
    assert allocator.reserved_bytes == 20 * MIB


def test_expandable_segments_grow_at_their_end() -> None:
    allocator = CachingAllocator(expandable=True)
    first = allocator.allocate(12 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    second = allocator.allocate(12 * MIB)
    assert second.address == first.address + 12 * MIB
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free(first)
    allocator.free(second)
    allocator.allocate(36 * MIB)
    assert allocator.reserved_bytes == 40 * MIB, "fixed segments would need 36 MiB more"


def test_the_smallest_capacity_lies_between_allocated_and_reserved() -> None:
    """12 MiB cached beside 14 and 20 in use: without the cached one 34 are enough."""
    events = [(1, 12 * MIB), (1, 0), (2, 14 * MIB), (3, 20 * MIB), (3, 0), (2, 0)]
    free_run = replay(events)
    assert (free_run.peak_allocated_bytes, free_run.peak_reserved_bytes) == (34 * MIB, 46 * MIB)
    found = smallest_capacity(events, free_run, tolerance=0.0)
    assert 34 * MIB <= found <= 36 * MIB
    replay(events, found)


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_invariants_over_random_programs(seed: int, expandable: bool) -> None:
    draw = random.Random(seed)
    capacity = None if seed % 2 else 600 * MIB
    allocator = CachingAllocator(capacity, expandable=expandable)
    live: list[Block] = []
    for _ in range(600):
        if live and draw.random() < 0.48:
            allocator.free(live.pop(draw.randrange(len(live))))
        else:
            size = int(2 ** draw.uniform(4, 25))
            try:
                block = allocator.allocate(size)
            except OutOfCapacity:
                continue
            assert block.size_bytes >= size
            assert block.size_bytes % GRAIN_BYTES == 0
            live.append(block)
        check(allocator, live)


def check(allocator: CachingAllocator, live: list[Block]) -> None:
    """No overlap, nothing lost, neighbours that are free are one, sums are right, capacity is kept."""
    free = list(allocator.free_blocks())
    assert not any(block.in_use for block in free) and all(block.in_use for block in live)
    everything = sorted([*live, *free], key=lambda block: block.address)
    for before, after in itertools.pairwise(everything):
        assert before.address + before.size_bytes <= after.address
    assert allocator.allocated_bytes == sum(block.size_bytes for block in live)
    assert allocator.reserved_bytes == sum(block.size_bytes for block in everything)
    assert allocator.peak_reserved_bytes >= allocator.reserved_bytes >= allocator.allocated_bytes
    assert allocator.capacity_bytes is None or allocator.reserved_bytes <= allocator.capacity_bytes
    for block in free:
        for neighbour in (block.before, block.after):
            assert neighbour is None or neighbour.in_use

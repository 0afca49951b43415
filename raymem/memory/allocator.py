"""Simulates CUDA's caching allocator: where every block of a recorded program lies, and how much is reserved.

Written from the documented rules of PyTorch's native allocator (c10/core/AllocatorConfig.h of torch 2.13 and the notes
on CUDA memory management): one stream, default configuration or expandable segments. Legend of the rules:

* a request is rounded up to 512 bytes; up to 1 MiB it is served by the small pool, else by the large one;
* a pool gives the smallest free block that is large enough, of equal ones the one at the lowest address;
* without one a segment is asked of the driver: 2 MiB for small requests, 20 MiB for those below 10 MiB, and the
  request rounded up to 2 MiB for all others;
* what is left of a block becomes a free block of its own, if it has 512 bytes (small) or more than 1 MiB (large);
* a block that is freed melts into free neighbours of its segment;
* if the driver has no more, wholly free segments are given back and the request is tried once more;
* expandable segments: a pool has one address range that grows by pages (2 MiB small, 20 MiB large) at its end, and
  blocks are cut to size whatever is left.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

KIB, MIB = 1 << 10, 1 << 20

GRAIN_BYTES = 512
SMALL_REQUEST_BYTES = 1 * MIB
"""Largest request of the small pool."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
OWN_SEGMENT_BYTES = 10 * MIB
"""From this size on a request gets a segment of its own size."""
OWN_SEGMENT_GRAIN_BYTES = 2 * MIB

Event = tuple[int, int]
"""(key of a block, its bytes if it is allocated, or 0 if it is freed)."""


class OutOfCapacity(Exception):
    """The simulated device cannot hold a request, even with every unused segment given back."""


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment."""

    address: int
    size_bytes: int
    small: bool
    """Whether it belongs to the small pool."""
    in_use: bool = False
    before: Block | None = None
    after: Block | None = None
    """Neighbours in the same segment."""


@dataclass(slots=True)
class _Pool:
    """Free blocks of one pool by (size, address)."""

    ranks: list[tuple[int, int]] = field(default_factory=list)
    """(size, address), in the order in which free blocks are considered."""
    blocks: dict[int, Block] = field(default_factory=dict)
    """The free blocks by address."""
    last: Block | None = None
    """The block at the end of the pool's address range (expandable segments only)."""

    def add(self, block: Block) -> None:
        bisect.insort(self.ranks, (block.size_bytes, block.address))
        self.blocks[block.address] = block

    def remove(self, block: Block) -> None:
        del self.ranks[bisect.bisect_left(self.ranks, (block.size_bytes, block.address))]
        del self.blocks[block.address]

    def take(self, size_bytes: int) -> Block | None:
        """Take the best fit from the free blocks."""
        at = bisect.bisect_left(self.ranks, (size_bytes, -1))
        if at == len(self.ranks):
            return None
        return self.blocks.pop(self.ranks.pop(at)[1])


class CachingAllocator:
    """A simulated device.

    Args:
        capacity_bytes: what the driver has; None for no limit.
        expandable: as with ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
    """

    def __init__(self, capacity_bytes: int | None = None, *, expandable: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self.expandable = expandable
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.flushes = 0
        """Times that unused segments had to be given back."""
        self._pools = {True: _Pool(), False: _Pool()}
        # Ranges of the two pools and of new segments never touch.
        self._next_address = 1 << 44
        self._range_start = {True: 1 << 60, False: 1 << 61}

    def allocate(self, num_bytes: int) -> Block:
        """Place a request.

        Raises:
            OutOfCapacity: it does not fit.
        """
        size = rounded(num_bytes)
        small = size <= SMALL_REQUEST_BYTES
        block = self._pools[small].take(size) or self._grow(size, small)
        if block is None:
            self.flushes += 1
            self._flush()
            block = self._grow(size, small)
            if block is None:
                raise OutOfCapacity(f"{size} bytes with {self.allocated_bytes} allocated of {self.capacity_bytes}")
        if block.size_bytes != size:
            self._split(block, size)
        block.in_use = True
        self.allocated_bytes += block.size_bytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Take a block back."""
        assert block.in_use
        block.in_use = False
        self.allocated_bytes -= block.size_bytes
        pool = self._pools[block.small]
        if block.after is not None and not block.after.in_use:
            self._absorb(block, block.after, pool)
        if block.before is not None and not block.before.in_use:
            earlier = block.before
            pool.remove(earlier)
            self._join(earlier, block, pool)
            block = earlier
        pool.add(block)

    def free_blocks(self) -> Iterator[Block]:
        """Yield every free block of both pools."""
        for pool in self._pools.values():
            yield from pool.blocks.values()

    def _absorb(self, block: Block, later: Block, pool: _Pool) -> None:
        pool.remove(later)
        self._join(block, later, pool)

    @staticmethod
    def _join(earlier: Block, later: Block, pool: _Pool) -> None:
        """Make two neighbours, none of them in the pool's list, one."""
        earlier.size_bytes += later.size_bytes
        earlier.after = later.after
        if later.after is not None:
            later.after.before = earlier
        if pool.last is later:
            pool.last = earlier

    def _split(self, block: Block, size: int) -> None:
        left = block.size_bytes - size
        enough = left >= GRAIN_BYTES if block.small or self.expandable else left > SMALL_REQUEST_BYTES
        if not enough:
            return
        pool = self._pools[block.small]
        rest = Block(block.address + size, left, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size_bytes = rest, size
        if pool.last is block:
            pool.last = rest
        pool.add(rest)

    def _reserve(self, num_bytes: int) -> bool:
        if self.capacity_bytes is not None and self.reserved_bytes + num_bytes > self.capacity_bytes:
            return False
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _grow(self, size: int, small: bool) -> Block | None:
        """Get a free block of at least ``size`` from the driver; None if it has no more."""
        if self.expandable:
            return self._extend(size, small)
        segment = segment_bytes(size)
        if not self._reserve(segment):
            return None
        block = Block(self._next_address, segment, small)
        self._next_address += segment
        return block

    def _extend(self, size: int, small: bool) -> Block | None:
        pool = self._pools[small]
        page = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        last = pool.last
        at_hand = last.size_bytes if last is not None and not last.in_use else 0
        added_bytes = -(-(size - at_hand) // page) * page
        if not self._reserve(added_bytes):
            return None
        if last is not None and not last.in_use:
            pool.remove(last)
            last.size_bytes += added_bytes
            return last
        address = self._range_start[small] if last is None else last.address + last.size_bytes
        block = Block(address, added_bytes, small, before=last)
        if last is not None:
            last.after = block
        pool.last = block
        return block

    def _flush(self) -> None:
        """Give back segments that are wholly free, or free pages at the end of an expandable range."""
        for small, pool in self._pools.items():
            for block in list(pool.blocks.values()):
                if not self.expandable and block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size_bytes
                elif self.expandable and block is pool.last:
                    page = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
                    self._unmap(block, block.size_bytes // page * page, pool)

    def _unmap(self, block: Block, num_bytes: int, pool: _Pool) -> None:
        if not num_bytes:
            return
        pool.remove(block)
        self.reserved_bytes -= num_bytes
        block.size_bytes -= num_bytes
        if block.size_bytes:
            pool.add(block)
            return
        pool.last = block.before
        if block.before is not None:
            block.before.after = None


def rounded(num_bytes: int) -> int:
    """Return the bytes that a request takes, rounded up to the allocator's grain."""
    return -(-num_bytes // GRAIN_BYTES) * GRAIN_BYTES or GRAIN_BYTES


def segment_bytes(size: int) -> int:
    """Return the bytes of the segment that the allocator asks the driver for, given a rounded request."""
    if size <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // OWN_SEGMENT_GRAIN_BYTES) * OWN_SEGMENT_GRAIN_BYTES


def replay(events: Iterable[Event], capacity_bytes: int | None = None, *, expandable: bool = False) -> CachingAllocator:
    """Run a recorded program on a fresh simulated device; returns the device as it is afterwards.

    Raises:
        OutOfCapacity: it does not fit.
    """
    allocator = CachingAllocator(capacity_bytes, expandable=expandable)
    allocate, free = allocator.allocate, allocator.free
    live: dict[int, Block] = {}
    for key, num_bytes in events:
        if num_bytes:
            live[key] = allocate(num_bytes)
        else:
            free(live.pop(key))
    return allocator


def smallest_capacity(events: list[Event], unlimited: CachingAllocator, *, tolerance: float = 2e-3) -> int:
    """Find the bytes of the smallest device on which the program runs, to within ``tolerance`` from above.

    Between it and what is reserved without a limit, the allocator survives by giving cached segments back.

    Args:
        events: the program.
        unlimited: what :func:`replay` makes of it without a limit.
    """
    low, high = unlimited.peak_allocated_bytes, unlimited.peak_reserved_bytes
    while high - low > max(OWN_SEGMENT_GRAIN_BYTES, tolerance * high):
        middle = (low + high) // 2
        try:
            replay(events, middle)
        except OutOfCapacity:
            low = middle
        else:
            high = middle
    return high

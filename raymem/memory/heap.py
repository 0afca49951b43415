"""Tells the C library's heap to give memory back to the system as soon as it is freed."""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
_LARGE_BYTES = 1 << 20


def give_freed_memory_back() -> None:
    """Let every large block of this process be memory of its own from now on; does nothing without glibc.

    glibc raises its limit for that to the largest block that was freed, up to 32 MiB, and then keeps what is freed, for
    each thread apart. Layers that are gathered, used and freed one after the other, by several threads, would pile up
    until the process has held the whole model.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)

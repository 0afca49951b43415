"""Measures, records and simulates memory. Bytes are ``int`` and named ``*_bytes``; GiB appear only when printing.

Useful alone: :class:`PeakMeter` measures a window, :class:`Tracer` records every storage that a program makes, real or
fake, and :class:`CachingAllocator` is PyTorch's CUDA allocator as a model. They load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymem.memory.allocator import CachingAllocator, replay
    from raymem.memory.meter import Peak, PeakMeter, resident_tensors
    from raymem.memory.trace import Tracer, live_at, peak_of

_HOME = {
    "CachingAllocator": "allocator",
    "Peak": "meter",
    "PeakMeter": "meter",
    "Tracer": "trace",
    "live_at": "trace",
    "peak_of": "trace",
    "replay": "allocator",
    "resident_tensors": "meter",
}

__all__ = [
    "CachingAllocator",
    "Peak",
    "PeakMeter",
    "Tracer",
    "live_at",
    "peak_of",
    "replay",
    "resident_tensors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

"""Which kind of device the memory of a step is for: the one it runs on, or the one that it is being planned for.

The planner runs steps on fake CPU tensors, whatever the device of the recipe. Code whose temporaries depend on the
device asks here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

_planned: str | None = None


def device_kind(device: torch.device) -> str:
    """``cpu``, ``cuda``, ...: of ``device``, or of what is being planned for."""
    return _planned or device.type


def is_planned() -> bool:
    """Whether steps are only planned: shapes count, values are never looked at."""
    return _planned is not None


def worth_visiting(starts: Sequence[int]) -> Sequence[int]:
    """Where the parts begin that a matrix is worked through by; of a planned one three stand for all.

    They are as good as one another there, but for the first, which makes what is used again, and a smaller last one.
    """
    return (*starts[:2], starts[-1]) if is_planned() and len(starts) > 3 else starts


@contextlib.contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Inside, steps take the decisions that they would take on a device of this kind."""
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before

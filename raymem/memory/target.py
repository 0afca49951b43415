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


def worth_visiting(starts: Sequence[int]) -> Sequence[int]:
    """Where the parts begin that a matrix is worked through by; where a step is only planned, three stand for all.

    Shapes count there and values are never looked at, so the parts are as good as one another, but for the first, which
    makes what is used again, and a smaller (or, of sizes in ascending order, the largest) last one.
    """
    return starts if _planned is None or len(starts) <= 3 else (*starts[:2], starts[-1])


def holds_no_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape only: those of planned models are on the meta device, or fake."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


@contextlib.contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Inside, steps take the decisions that they would take on a device of this kind."""
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before

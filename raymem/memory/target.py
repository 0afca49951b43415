"""Tells the kind of device that a step's memory is for: the one it runs on, or the one that it is planned for.

The planner runs steps on fake CPU tensors, whatever the device of the recipe. Code whose temporaries depend on the
device asks here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

_planned: str | None = None


def device_kind(device: torch.device) -> str:
    """Return ``cpu``, ``cuda``, ...: the kind that is being planned for, if any, or else that of ``device``."""
    return _planned or device.type


def worth_visiting(starts: Sequence[int]) -> Sequence[int]:
    """Return the chunk starts to visit: all of them, or three while a step is only planned.

    On fake tensors only shapes matter, so three chunks stand for all: the first, which allocates the buffer that the
    others use again, one full chunk, and the last, which may be shorter (or, of sizes in ascending order, the largest).
    """
    return starts if _planned is None or len(starts) <= 3 else (*starts[:2], starts[-1])


def holds_no_values(tensor: torch.Tensor) -> bool:
    """Say whether a tensor has a shape only: those of planned models are on the meta device, or fake."""
    from raymem.private_apis import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


@contextlib.contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Let steps in the block take the decisions that they would take on a device of this kind."""
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before

"""Copies that are late: what a CUDA stream may do at its slowest, so that a CPU shows a wait that is missing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from raymem.memory import host
from raymem.memory.host import CopyLane


class DelayedLane(CopyLane):
    """Takes a copy only when somebody waits for it, from what the source holds by then.

    A source that was freed before it was copied, and a target that was freed before it was written, are errors; a copy
    that is read too early holds NaN, and one whose source was written to meanwhile something else.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._begun: list[Callable[[], None]] = []
        self.taken = 0
        """Copies that were waited for."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host_tensor = host.host_empty(tensor.numel(), tensor.dtype, tensor.device)
        source = weakref.ref(tensor)

        def copy() -> None:
            alive = source()
            assert alive is not None, "memory of the device was freed before it was copied"
            host_tensor.copy_(alive)

        self._begun.append(copy)
        return host_tensor

    def to_device(self, host_tensor: torch.Tensor) -> torch.Tensor:
        tensor = torch.full_like(host_tensor, math.nan if host_tensor.is_floating_point() else 0)
        target = weakref.ref(tensor)

        def copy() -> None:
            alive = target()
            assert alive is not None, "memory of the device was freed while a copy to it was under way"
            alive.data.copy_(host_tensor)

        self._begun.append(copy)
        return tensor

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.is_floating_point():
            target.fill_(math.nan)

        def copy() -> None:
            assert target.untyped_storage().nbytes(), "memory of the device was freed while a copy was under way"
            target.copy_(source)

        self._begun.append(copy)

    def mark(self) -> int:
        return len(self._begun)

    def wait(self, mark: int | None) -> None:
        while self.taken < (mark or 0):
            self._begun[self.taken]()
            self.taken += 1


def delay_copies(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[DelayedLane]:
    """Give what ``module`` makes lanes that delay; returns those that are made."""
    lanes: list[DelayedLane] = []

    def make(device: torch.device) -> DelayedLane:
        lanes.append(DelayedLane(device))
        return lanes[-1]

    monkeypatch.setattr(module, "CopyLane", make)
    return lanes

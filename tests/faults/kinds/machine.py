"""Faults of the machine that a process alone sees: its clock, its arithmetic."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from tests.faults.cases import STEPS, Case
from tests.faults.fault import Fault
from tests.faults.sessions import Moment

if TYPE_CHECKING:
    from tests.faults.arena import Arena


class _FromStart(Fault):
    """A fault that is in the session's process from its first step on."""

    def moment(self, case: Case, file_uses: int) -> Moment:
        return Moment("step", 1)


class NanGradients(_FromStart):
    """The gradients of one step are not numbers, once."""

    name = "NaN gradients"

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._step = draw.randint(1, STEPS)

    def applies(self, case: Case, arena: Arena) -> bool:
        return case.workers == 0

    def shims(self, number: int) -> tuple[tuple[str, dict[str, Any]], ...]:
        return (("nan_gradients", {"step": self._step}),) if number == 1 else ()


class ClockJumps(_FromStart):
    """The wall clock jumps by hours, days or years, forward or back."""

    name = "clock jumps"
    can_fail = False

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._seconds = draw.choice((-1.0, 1.0)) * draw.choice((10.0, 3600.0, 86400.0, 90000.0, 3e7, 1e9))
        self._step = draw.randint(0, STEPS)

    def applies(self, case: Case, arena: Arena) -> bool:
        return case.workers == 0

    def shims(self, number: int) -> tuple[tuple[str, dict[str, Any]], ...]:
        return (("clock_jumps", {"step": self._step, "seconds": self._seconds}),) if number == 1 else ()

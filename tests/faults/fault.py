"""What a kind of fault is: when it can strike, what it does, and how it passes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, ClassVar

from tests.faults.cases import SAVE_EVERY, STEPS, Case
from tests.faults.sessions import Moment, Session

if TYPE_CHECKING:
    from tests.faults.arena import Arena
    from tests.faults.rounds import Round


class Fault:
    """One kind of fault; an instance belongs to one round.

    Args:
        draw: the round's random numbers, from which everything is drawn that is left to chance.
    """

    name: ClassVar[str] = ""
    can_fail: ClassVar[bool] = True
    """Whether a session may stop with an error; a fault that a run has to survive within its session says False."""
    timeout_s: ClassVar[float] = 0.0
    """More time for a session than usual."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def applies(self, case: Case, arena: Arena) -> bool:
        """Say whether the fault makes sense for a run."""
        return True

    def moment(self, case: Case, file_uses: int) -> Moment:
        """Draw a moment: of a local session a step or any use of a file, else some time after a checkpoint."""
        if case.workers:
            number = SAVE_EVERY * self.draw.randrange(0, STEPS // SAVE_EVERY)
            return Moment("checkpoint", number, self.draw.uniform(0.0, 0.6) if number else self.draw.uniform(0.0, 8.0))
        if file_uses and self.draw.random() < 0.6:
            # An object store is not reached by files; what is left is about two thirds.
            return Moment("file", self.draw.randint(1, file_uses * 6 // 10 if case.remote else file_uses))
        return Moment("step", self.draw.randint(1, STEPS))

    def prepare(self, round_: Round) -> None:
        """Set the ground before the first session."""

    def shims(self, number: int) -> tuple[tuple[str, dict[str, Any]], ...]:
        """Changes to the process of the ``number``-th session, from 1; see :mod:`tests.faults.shims`."""
        return ()

    def inject(self, round_: Round, session: Session) -> None:
        """Strike. The session waits at its moment, unless it is one with workers."""

    def heal(self, round_: Round, session: Session) -> None:
        """Let it pass: ``lasts_s`` after it struck, and when the session has ended. May be called twice."""

    @property
    def lasts_s(self) -> float:
        """Seconds until it passes; infinite for one that only passes when the session has ended."""
        return float("inf")

    def before(self, round_: Round, number: int) -> None:
        """Do something before the ``number``-th session, from 2."""

    def repeats(self, number: int) -> bool:
        """Say whether it strikes in the ``number``-th session too."""
        return number == 1

    def close(self) -> None:
        """End what :meth:`prepare` began."""

    def problems(self, round_: Round) -> list[str]:
        """Say what is wrong at the end that only this kind of fault can tell."""
        return []

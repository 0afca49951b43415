"""Chooses how threads of torch wait for work on the CPU, which is read once, when torch loads."""

from __future__ import annotations

import os
import time
from pathlib import Path

SPINS = "10000"
"""Rounds that a thread waits in a loop before it sleeps: a fraction of a millisecond, longer than it mostly waits."""
_LOOK_S = 0.1
_QUIET = 0.15
"""Cores that others may use for a machine to count as quiet."""
_POLICY, _SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
_is_ours = False
"""Whether the policy in the environment is the one that is set here."""


def sleep_while_waiting() -> None:
    """Let waiting threads sleep, unless the user has said how they wait.

    A step takes longer so. But threads that wait in a loop make it several times as long as soon as anything else (Ray
    itself, say) wants one of the cores.
    """
    global _is_ours
    if _POLICY not in os.environ and _SPINS not in os.environ:
        os.environ[_POLICY], _is_ours = "PASSIVE", True


def spin_on_quiet_cores() -> None:
    """Let waiting threads of this process spin for a moment, if nothing else uses the cores just now.

    For commands that compute in this process only. Results do not change, only how long a step takes: to be woken each
    time costs a third of a small one (benchmarks/thread_wait.py).
    """
    global _is_ours
    if _is_ours and _cores_of_others() < _QUIET:
        del os.environ[_POLICY]
        os.environ[_SPINS], _is_ours = SPINS, False


def _cores_of_others() -> float:
    """Return how many cores other processes use just now; one where that cannot be told."""
    try:
        before = _worked_s()
        time.sleep(_LOOK_S)
        return (_worked_s() - before) / _LOOK_S
    except (OSError, ValueError):
        return 1.0


def _worked_s() -> float:
    """Return the seconds that all cores together have worked since the machine started."""
    ticks = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    user, nice, system, _idle, _iowait, irq, softirq = ticks
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

"""Defines budgets and verdicts as plain values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_bytes(text: str) -> int:
    """Parse ``24GiB``, ``512 MiB``, ``80GB`` or a plain number of bytes.

    Raises:
        ValueError: no such number or unit, or nothing left of it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no amount of memory; write it as 24GiB, 512MiB or 80GB")
    num_bytes = int(float(match.group(1)) * unit)
    if num_bytes < 1:
        raise ValueError(f"{text!r} is less than one byte")
    return num_bytes


def bytes_text(num_bytes: float) -> str:
    """Format bytes for people, in the largest binary unit of which there is one."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


@dataclass(frozen=True)
class Fits:
    """The prediction is within the budget."""

    headroom_bytes: int


@dataclass(frozen=True)
class Exceeds:
    """The prediction is above the budget."""

    by_bytes: int
    largest_term: str
    """The memory category that has most at the peak."""
    would_help: tuple[str, ...]
    """The recipe settings that attack that term."""


Verdict = Fits | Exceeds


def verdict(
    needed_bytes: int, budget_bytes: int, at_peak: dict[str, int], would_help: Callable[[str], tuple[str, ...]]
) -> Verdict:
    """Compare a prediction with a budget.

    Args:
        needed_bytes: what the device must have.
        at_peak: category -> bytes at the peak.
        would_help: category -> settings that lower it.
    """
    if needed_bytes <= budget_bytes:
        return Fits(budget_bytes - needed_bytes)
    largest = max(at_peak, key=lambda name: at_peak[name])
    return Exceeds(needed_bytes - budget_bytes, largest, would_help(largest))

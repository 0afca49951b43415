"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def status_bytes(field: str) -> int:
    """Return a figure of ``/proc/self/status``, such as VmRSS or VmHWM."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024

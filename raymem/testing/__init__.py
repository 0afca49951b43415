"""Tests and measurements for memory methods, raymem's own and yours; needs pytest where it says so.

:class:`ConformanceSuite` holds the tests that every combination of axes has to pass, :func:`measure_step` the measured
peak beside a plan, :func:`heap_in_use_bytes` what a forward pass saved, and :func:`in_processes` a group of ranks.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymem.testing.measure import heap_in_use_bytes, measure_step
    from raymem.testing.processes import in_processes
    from raymem.testing.suite import ConformanceSuite

_HOME = {
    "ConformanceSuite": "suite",
    "heap_in_use_bytes": "measure",
    "in_processes": "processes",
    "measure_step": "measure",
}

__all__ = ["ConformanceSuite", "heap_in_use_bytes", "in_processes", "measure_step"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    module = f"{__name__}.{_HOME[name]}"
    if name == "ConformanceSuite" and module not in sys.modules:
        import pytest

        pytest.register_assert_rewrite(module, f"{__name__}.tensors")  # a failed assertion then shows its values
    return getattr(importlib.import_module(module), name)

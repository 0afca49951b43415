"""MLorc: optimizers whose momentum is held as low-rank factors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymem.methods.mlorc.optimizer import MLorcAdamW, MLorcLion

__all__ = ["MLorcAdamW", "MLorcLion"]


def __getattr__(name: str) -> Any:
    """The optimizers on first use: reading a recipe needs the options only, and must not load torch."""
    if name in __all__:
        return getattr(importlib.import_module("raymem.methods.mlorc.optimizer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

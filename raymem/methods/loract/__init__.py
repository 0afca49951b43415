"""LoRAct: online low-rank compression of activations. README.md beside this file is the map."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymem.methods.loract.compression import Compression, compress_activations

__all__ = ["Compression", "compress_activations"]


def __getattr__(name: str) -> Any:
    """The method on first use: reading a recipe needs the options only, and must not load torch."""
    if name in __all__:
        return getattr(importlib.import_module("raymem.methods.loract.compression"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

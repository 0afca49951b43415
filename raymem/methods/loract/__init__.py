"""LoRAct: online low-rank compression of activations. README.md beside this file is the map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymem.methods import lazy_exports

if TYPE_CHECKING:
    from raymem.methods.loract.compression import Compression, compress_activations

__all__ = ["Compression", "compress_activations"]

__getattr__ = lazy_exports(__name__, dict.fromkeys(__all__, "compression"))

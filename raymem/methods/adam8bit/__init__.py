"""AdamW whose moments are held in 8 bits, by the kernels of bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymem.methods import lazy_exports

if TYPE_CHECKING:
    from raymem.methods.adam8bit.optimizer import AdamW8bit

__all__ = ["AdamW8bit"]

__getattr__ = lazy_exports(__name__, dict.fromkeys(__all__, "optimizer"))

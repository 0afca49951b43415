"""MLorc: optimizers whose momentum is held as low-rank factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymem.methods import lazy_exports

if TYPE_CHECKING:
    from raymem.methods.mlorc.optimizer import MLorcAdamW, MLorcLion

__all__ = ["MLorcAdamW", "MLorcLion"]

__getattr__ = lazy_exports(__name__, dict.fromkeys(__all__, "optimizer"))

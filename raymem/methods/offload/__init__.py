"""Activations in the memory of the host: exact, for the time that copies take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymem.methods import lazy_exports

if TYPE_CHECKING:
    from raymem.methods.offload.install import offload_activations

__all__ = ["offload_activations"]

__getattr__ = lazy_exports(__name__, dict.fromkeys(__all__, "install"))

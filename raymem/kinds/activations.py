"""Defines the base class of the kinds of the ``activations`` axis."""

from __future__ import annotations

from typing import Any

from raymem.kinds.core import Kind, OptionsT


class ActivationsKind(Kind[OptionsT]):
    """A way to keep activations for the backward pass."""

    def prepare(self, model: Any, options: OptionsT) -> None:
        """Change a transformers model before its adapter is attached."""

    def install(self, model: Any, options: OptionsT, seed: int) -> None:
        """Change the complete model, loaded or on the meta device."""

    def keeps_stock_layers(self, options: OptionsT) -> bool:
        """Say whether it needs what transformers' own layers save, so that raymem's lean ones must not replace them."""
        return False

    def rough_bytes(self, options: OptionsT, *, layers: int, layer_bytes: int, input_bytes: int) -> int:
        """Estimate within a factor of two the bytes that one micro-batch keeps, for models that cannot be traced.

        Args:
            layer_bytes: everything that one layer computes.
            input_bytes: the hidden states that enter one layer.
        """
        return layers * layer_bytes

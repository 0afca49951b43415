"""transformers' checkpointing of layers, by whichever name a release has it."""

from __future__ import annotations

from typing import Any


def checkpoint_layers(model: Any) -> None:
    """Let each layer keep its input alone, and compute the rest again in the backward pass."""
    # The lowest releases have only the older name, which the newest call deprecated.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def keep_layers(model: Any) -> None:
    """Undo :func:`checkpoint_layers`."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()

"""The memory methods, one folder each; pure torch, usable without Ray, MLflow or a recipe."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a method's package, which imports what it exports on first use.

    Reading a recipe needs a method's options only, and must not load torch.

    Args:
        home: exported name -> module of the package that defines it.
    """

    def getattr_(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return getattr_


_EXPORTS = {
    "adam8bit": ("AdamW8bit",),
    "chunked_loss": ("cross_entropy_sum",),
    "loract": ("compress_activations",),
    "loram": ("PruneOptions", "load_pruned", "prune_model", "recover_adapter", "verify_recovery"),
    "mlorc": ("MLorcAdamW", "MLorcLion"),
    "moram": ("MoRAMConfig", "check_base", "export_lora", "export_shira", "select_indices"),
    "offload": ("offload_activations",),
}
"""Room -> what of it is public here."""

__all__ = sorted(name for names in _EXPORTS.values() for name in names)

__getattr__ = lazy_exports(__name__, {name: room for room, names in _EXPORTS.items() for name in names})

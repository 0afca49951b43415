"""raymem: memory-budgeted fine-tuning of large language models on Ray clusters.

The public names are those of ``__all__``; docs/api.md shows each. They load on first use, so that importing raymem
costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "EvaluationResult": "raymem.runs.results",
    "Plan": "raymem.planner.types",
    "Recipe": "raymem.recipe.schema",
    "SweepResult": "raymem.sweeps.result",
    "TrainResult": "raymem.runs.results",
    "evaluate": "raymem.api",
    "load": "raymem.api",
    "load_recipe": "raymem.api",
    "merge": "raymem.api",
    "plan": "raymem.api",
    "plan_module": "raymem.planner.module",
    "register_activations": "raymem.recipe.axes",
    "register_adapter": "raymem.recipe.axes",
    "register_base": "raymem.recipe.axes",
    "register_loss": "raymem.recipe.axes",
    "register_optimizer": "raymem.recipe.axes",
    "register_tracker": "raymem.recipe.axes",
    "sweep": "raymem.api",
    "train": "raymem.api",
}
"""Public name -> module that defines it."""

__all__ = ["__version__", "errors", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("raymem.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'raymem' has no attribute {name!r}; public are {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

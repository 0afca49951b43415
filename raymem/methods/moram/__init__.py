"""MoRAM: a low-rank update of gradient-selected connections, as an adapter of PEFT (IJCAS 23(11), 2025).

::

    model = peft.get_peft_model(model, MoRAMConfig(r=16, density=0.03, target_modules="all-linear"))
    select_indices(model, batches)  # keyword dicts for the model's forward, with labels
    # train as usual

Importing this package makes PEFT know the method. Importing peft takes seconds, and recipes need no more than the
options in :mod:`raymem.methods.moram.config`, so it waits until somebody imports peft; :func:`register` does not.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

from raymem.methods import lazy_exports

if TYPE_CHECKING:
    from raymem.methods.moram.export import export_lora, export_shira
    from raymem.methods.moram.ops import choose_formulation, moram_linear
    from raymem.methods.moram.selection import check_base, mark_selected, select_indices
    from raymem.methods.moram.tuner import MoRAMConfig, model_state

__all__ = [
    "MoRAMConfig",
    "check_base",
    "choose_formulation",
    "export_lora",
    "export_shira",
    "mark_selected",
    "model_state",
    "moram_linear",
    "register",
    "select_indices",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "MoRAMConfig": "tuner",
        "check_base": "selection",
        "choose_formulation": "ops",
        "export_lora": "export",
        "export_shira": "export",
        "mark_selected": "selection",
        "model_state": "tuner",
        "moram_linear": "ops",
        "select_indices": "selection",
    },
)


def register() -> None:
    """Make PEFT know the method, so that it loads such adapters; doing it twice is harmless.

    A release of PEFT that cannot be taught (before 0.21) is left as it is: whoever asks for MoRAM itself is told.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{__name__}.tuner")


def _register_with(peft: ModuleType) -> None:
    if f"{__name__}.layer" not in sys.modules:  # which asked for peft itself then, and will register
        register()


register_post_import_hook(_register_with, "peft")

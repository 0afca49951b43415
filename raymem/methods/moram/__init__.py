"""MoRAM: a low-rank update of gradient-selected connections, as an adapter of PEFT (IJCAS 23(11), 2025).

::

    model = peft.get_peft_model(model, MoRAMConfig(r=16, density=0.03, target_modules="all-linear"))
    select_indices(model, batches)  # keyword dicts for the model's forward, with labels
    # train as usual

Importing this package makes PEFT know the method. Importing peft takes seconds, so until somebody does, only a note is
left with Python's import system; recipes read their options from :mod:`raymem.methods.moram.config` at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymem.methods import lazy_exports
from raymem.methods.moram._on_import import after_import

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

after_import("peft", f"{__name__}.tuner")

"""LoRAM: train LoRA on a pruned model, recover it for the full one (arXiv 2502.13533).

Reading a recipe needs the options only, and must not load torch; the rest is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymem.methods import lazy_exports
from raymem.methods.loram.config import LoRAMOptions, PruneOptions

if TYPE_CHECKING:
    from raymem.methods.loram.manifest import Manifest, mark_aligned, read_manifest
    from raymem.methods.loram.nonuniform import load_pruned, pruned_layers
    from raymem.methods.loram.pruning.plan import Plan, plan_pruning
    from raymem.methods.loram.pruning.prune import prune_model
    from raymem.methods.loram.recover import recover_adapter, stamp_adapter
    from raymem.methods.loram.validate import validate_coupling
    from raymem.methods.loram.verify import Verification, verify_recovery

__all__ = [
    "LoRAMOptions",
    "Manifest",
    "Plan",
    "PruneOptions",
    "Verification",
    "load_pruned",
    "mark_aligned",
    "plan_pruning",
    "prune_model",
    "pruned_layers",
    "read_manifest",
    "recover_adapter",
    "stamp_adapter",
    "validate_coupling",
    "verify_recovery",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Manifest": "manifest",
        "Plan": "pruning.plan",
        "Verification": "verify",
        "load_pruned": "nonuniform",
        "mark_aligned": "manifest",
        "plan_pruning": "pruning.plan",
        "prune_model": "pruning.prune",
        "pruned_layers": "nonuniform",
        "read_manifest": "manifest",
        "recover_adapter": "recover",
        "stamp_adapter": "recover",
        "validate_coupling": "validate",
        "verify_recovery": "verify",
    },
)

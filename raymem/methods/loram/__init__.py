"""LoRAM: train LoRA on a pruned model, recover it for the full one (arXiv 2502.13533)."""

from raymem.methods.loram.config import PruneOptions
from raymem.methods.loram.manifest import Manifest, mark_aligned, read_manifest
from raymem.methods.loram.nonuniform import load_pruned, pruned_layers
from raymem.methods.loram.plan import Plan, plan_pruning
from raymem.methods.loram.prune import prune_model
from raymem.methods.loram.recover import recover_adapter, stamp_adapter
from raymem.methods.loram.validate import validate_coupling
from raymem.methods.loram.verify import Verification, verify_recovery

__all__ = [
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

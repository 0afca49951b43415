"""LoRAM: train LoRA on a pruned model, recover it for the full one (arXiv 2502.13533)."""

from raymem.methods.loram.config import PruneOptions
from raymem.methods.loram.nonuniform import load_pruned, pruned_layers
from raymem.methods.loram.plan import Plan, plan_pruning

__all__ = ["Plan", "PruneOptions", "load_pruned", "plan_pruning", "pruned_layers"]

"""LoRAM as stages of a run: prune, align, train, recover, verify, evaluate."""

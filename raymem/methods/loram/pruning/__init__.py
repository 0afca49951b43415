"""Writing the pruned model, layer by layer, in steps that any process can do."""

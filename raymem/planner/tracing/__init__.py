"""Runs a step on tensors without values, and records every storage that it allocates."""

"""Running a step on tensors without values, and recording every storage that it allocates."""

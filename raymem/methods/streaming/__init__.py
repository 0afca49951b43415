"""Frozen layers in the memory of the host, whose weights come to the device when they run."""

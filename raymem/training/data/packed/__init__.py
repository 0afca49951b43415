"""Prepared data: examples packed into rows, on disk, and in which order they are read."""

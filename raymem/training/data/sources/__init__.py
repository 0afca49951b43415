"""Finds the files or the data set that a recipe's source names, and identifies their contents."""

from raymem.training.data.sources.opened import OpenedSource, open_source, open_sources

__all__ = ["OpenedSource", "open_source", "open_sources"]

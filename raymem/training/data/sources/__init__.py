"""Where examples come from: the files or the data set that a recipe's source names, and what tells them apart."""

from raymem.training.data.sources.opened import OpenedSource, open_source

__all__ = ["OpenedSource", "open_source"]

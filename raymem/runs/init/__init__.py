"""Writes a recipe for a model and data that are there: what `raymem init` chooses, and why, line by line."""

from raymem.runs.init.choose import Wishes, new_recipe

__all__ = ["Wishes", "new_recipe"]

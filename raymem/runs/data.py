"""Prepares a recipe's data in this process, without a run, to be looked at."""

from __future__ import annotations

from raymem.recipe.schema import Recipe
from raymem.runs.backend import LocalBackend
from raymem.runs.prepare import Split, prepare_data
from raymem.runs.resolve import resolve_tokenizer
from raymem.training.data.packed.shards import Prepared


def prepare_here(recipe: Recipe, split: Split) -> tuple[str, Prepared]:
    """Prepare a split of a recipe that is not trained now; return the tokenizer's directory and the split.

    Raises:
        DataError, ModelError, StorageError: see :func:`raymem.training.data.packed.shards.prepare`.
    """
    storage = recipe.storage.open()
    storage.check_writable()
    tokenizer = resolve_tokenizer(recipe, storage)
    return tokenizer, prepare_data(recipe.data, split, tokenizer, storage, LocalBackend())

"""Looks at a recipe's data: prepares it without a run, and finds in it what decides the memory of a step."""

from __future__ import annotations

import numpy as np

from raymem.planner import RowFacts
from raymem.recipe.schema import Recipe
from raymem.runs.backend import LocalBackend
from raymem.runs.prepare import Split, prepare_data
from raymem.runs.resolve import resolve_tokenizer
from raymem.training.data.batches import most_targets
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shards import Prepared
from raymem.training.loop import sampler_of, steps_of

_ROWS_LOOKED_AT = 10_000


def prepare_here(recipe: Recipe, split: Split) -> tuple[str, Prepared]:
    """Prepare a split of a recipe that is not trained now; return the tokenizer's directory and the split.

    Raises:
        DataError, ModelError, StorageError: see :func:`raymem.training.data.packed.shards.prepare`.
    """
    storage = recipe.storage.open()
    storage.check_writable()
    tokenizer = resolve_tokenizer(recipe, storage)
    return tokenizer, prepare_data(recipe.data, split, tokenizer, storage, LocalBackend())


def row_facts(recipe: Recipe, train_data: Prepared) -> RowFacts:
    """Return the facts of every step but the very first, which holds no optimizer state yet.

    A run that takes more than 10,000 rows is taken to need a mask, if its packing can, and to meet the rows with the
    most targets in one micro-batch.
    """
    rows = PackedRows(train_data.directories)
    sampler = sampler_of(recipe, rows)
    steps = steps_of(recipe, sampler)
    world, size = max(1, recipe.scaling.least_workers), recipe.train.rows_per_pass
    if steps > -(-_ROWS_LOOKED_AT // recipe.train.global_batch):
        return RowFacts(recipe.data.packing != "wrapped", int(np.sort(rows.num_targets)[-size:].sum()))
    batches = [sampler.ids(step) for step in range(min(1, steps - 1), steps)]
    masked = any(rows.needs_mask(ids) for ids in batches)
    return RowFacts(masked, max(most_targets(rows, ids, world, size) for ids in batches))

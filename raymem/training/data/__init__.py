"""Data of a run: sources -> examples -> tokens -> packed rows on disk -> batches.

:func:`prepare` runs once, on the driver or in tasks; workers then open its directories with :class:`PackedRows`, ask
:class:`Sampler` which rows a step takes, and build their share with :func:`rank_batches`.
"""

from raymem.storage.publish import verify
from raymem.training.data.batches import Batch, eval_batches, global_targets, rank_batches
from raymem.training.data.dataset import PackedRows
from raymem.training.data.sampler import Sampler
from raymem.training.data.shards import MapBlocks, Prepared, PreparedSource, prepare, serial, source_keys

__all__ = [
    "Batch",
    "MapBlocks",
    "PackedRows",
    "Prepared",
    "PreparedSource",
    "Sampler",
    "eval_batches",
    "global_targets",
    "prepare",
    "rank_batches",
    "serial",
    "source_keys",
    "verify",
]

"""Prepares the data of a run: sources -> examples -> tokens -> packed rows on disk -> batches.

:func:`.packed.shards.prepare` runs once, on the driver or in tasks; workers then open its directories
with ``PackedRows``, ask ``Sampler`` which rows a step takes, and build their share with ``rank_batches``.
"""

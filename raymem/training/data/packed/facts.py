"""Concludes from the counts of a source's shards: the facts of its manifest, and warnings to whoever prepares it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from raymem.errors import DataError
from raymem.training.data.packed.dropped import cure_of_dropped, lengths_text, percentiles, why_dropped
from raymem.training.data.packed.pack import Packing
from raymem.training.data.unread import line

_NO_COUNTS = ("shard", "unread", "noted", "reasons", "lengths")
Counts = dict[str, Any]
"""What a task says of its shard, see :func:`raymem.training.data.packed.shards.write_shard`: plain JSON values."""

log = logging.getLogger(__name__)


def conclude(
    results: Sequence[Counts], where: str, path: str, *, sequence_length: int, packing: Packing, asks: bool
) -> dict[str, Any]:
    """Return the facts of a source whose shards are written, and warn of what is odd about its rows.

    Args:
        results: of all its blocks, in order.
        path: of the source in the recipe.
        asks: the recipe leaves open whether prompts are rendered in the chat template.

    Raises:
        DataError: no example has a token to predict.
    """
    shards = [result["shard"] for result in results if result["shard"] is not None]
    totals = {name: sum(result[name] for result in results) for name in results[0] if name not in _NO_COUNTS}
    beside, noted, reasons = (
        sum((Counter(result[name]) for result in results), Counter[str]()) for name in ("unread", "noted", "reasons")
    )
    if beside:
        log.warning("%s", line(where, beside))
    for note, count in noted.items():
        log.warning("%s: %s", where, note.format(count=count, turns=totals["num_turns"]))
    if totals["taken_as_it_is"] and totals["rendered"] and asks:
        log.warning(
            "%s: the chat template renders %d examples, but not %d whose prompts hold its marks already: if that is "
            "not meant, set template: chat or none",
            where, totals["rendered"], totals["taken_as_it_is"],
        )  # fmt: skip
    facts = {**totals, "reasons": dict(reasons), "sequence_length": sequence_length}
    lengths = (Counter({int(tokens): count for tokens, count in result["lengths"].items()}) for result in results)
    facts["lengths"] = percentiles(sum(lengths, Counter[int]()))
    if not shards:
        raise DataError(
            f"{where}.path={path!r}: none of its {totals['num_examples']} examples has a token to predict "
            f"({why_dropped(facts)}): {cure_of_dropped(facts)}."
        )
    if totals["dropped"]:
        log.warning(
            "%s: %d of %d examples dropped: nothing in them is to be predicted (%s)",
            where, totals["dropped"], totals["num_examples"], why_dropped(facts),
        )  # fmt: skip
    if totals["truncated"]:
        log.warning(
            "%s: %d of %d examples truncated: longer than data.sequence_length=%d (%s)",
            where, totals["truncated"], totals["num_examples"], sequence_length, lengths_text(facts),
        )  # fmt: skip
    return {**facts, "unread": dict(beside), "shards": shards, "packing": packing}

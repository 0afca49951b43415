"""Says why examples were left out, and refuses a source that loses too many: in words, from the facts of a manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from raymem.errors import DataError

PERCENTILES = (50, 95, 100)


def cut_before_target(sequence_length: int) -> str:
    """Return the reason for which an example is dropped that has targets, but none within a row."""
    return f"cut before their first target by data.sequence_length={sequence_length}"


def percentiles(lengths: Counter[int]) -> dict[str, int]:
    """Return percentile -> tokens of the smallest example that is at least as long as so many percent of them.

    Args:
        lengths: tokens of an example before it is cut -> number of such examples.
    """
    found: dict[str, int] = {}
    total, so_far = lengths.total(), 0
    for length in sorted(lengths):
        so_far += lengths[length]
        for percent in PERCENTILES:
            if so_far * 100 >= percent * total:
                found.setdefault(str(percent), length)
    return found


def lengths_text(facts: Mapping[str, Any]) -> str:
    """Describe the lengths of a source's examples; "" for data that an older raymem prepared without them."""
    lengths = facts.get("lengths") or {}
    if not lengths:
        return ""
    return f"the 95th percentile of the lengths is {lengths['95']} tokens, the longest has {lengths['100']}"


def why_dropped(facts: Mapping[str, Any]) -> str:
    """List the reasons with their counts, and the lengths where these are one."""
    reasons = Counter(facts["reasons"])
    parts = [f"{reason}: {count}" for reason, count in reasons.most_common()]
    if _cut(facts) and (text := lengths_text(facts)):
        parts.append(text)
    return "; ".join(parts)


def cure_of_dropped(facts: Mapping[str, Any]) -> str:
    """Say what brings the examples back."""
    cures = []
    if cut := _cut(facts):
        enough = (facts.get("lengths") or {}).get("95")
        cures.append(f"raise data.sequence_length to {enough}" if enough else "raise data.sequence_length")
    if sum(facts["reasons"].values()) > cut:
        cures.append("give the others something to predict")
    return " and ".join(cures)


def check_dropped(facts: Mapping[str, Any], where: str, most: float) -> None:
    """Refuse a source of which more than the share ``most`` of the examples is left out.

    Raises:
        DataError: says why they are, and what to do.
    """
    dropped, examples = facts["dropped"], facts["num_examples"]
    if dropped > most * examples:
        raise DataError(
            f"{where}: {dropped} of {examples} examples would be dropped, since nothing in them is to be predicted "
            f"({why_dropped(facts)}), and data.max_dropped={most:g} allows {int(most * examples)}: "
            f"{cure_of_dropped(facts)}; or raise data.max_dropped to train without them."
        )


def _cut(facts: Mapping[str, Any]) -> int:
    return int(facts["reasons"].get(cut_before_target(facts["sequence_length"]), 0))

"""Shows prepared data to people: figures per source, and examples in text with their targets marked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from raymem.recipe.data import Source
from raymem.storage.publish import read_manifest
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shards import Prepared
from raymem.training.data.pairs import described

OPEN, CLOSE = "[[", "]]"
"""Marks around targets in plain text."""
_SPACE = "\u00b7"


@dataclass(frozen=True)
class SourceSummary:
    """The figures of a source."""

    where: str
    """Where the recipe names it: ``data.train[0]``."""
    path: str
    how: str
    """Its format, and whether a chat template renders it, in words."""
    num_read: int
    """Rows of the data."""
    num_kept: int
    """Examples; a conversation may give several."""
    dropped: dict[str, int]
    """Maps each reason to the number of examples left out for it."""
    truncated: int
    """Examples that lost their end."""
    num_tokens: int
    """The number of tokens without padding."""
    num_targets: int
    fill: float
    """Share of the packed rows that is not padding."""
    lengths: dict[str, int]
    """Percentile of the examples, 50, 95 and 100 -> their tokens before they are cut; empty where they were prepared by
    a raymem that did not count them."""


@dataclass(frozen=True)
class Part:
    """A stretch of an example that is to be predicted, or is not."""

    text: str
    """The text, with invisible white space made visible."""
    is_target: bool


def summarise(sources: Sequence[Source], prepared: Prepared) -> list[SourceSummary]:
    """Return the figures of every source of a split."""
    summaries: list[SourceSummary] = []
    for source, prepared_source in zip(sources, prepared.sources, strict=True):
        manifest = read_manifest(prepared_source.directory)
        assert manifest is not None, "prepared"
        facts = manifest["facts"]
        summaries.append(
            SourceSummary(
                where=prepared_source.where,
                path=source.path,
                how=described(prepared_source.row_format, prepared_source.template, facts),
                num_read=facts["num_read"],
                num_kept=facts["num_examples"] - facts["dropped"],
                dropped=facts["reasons"],
                truncated=facts["truncated"],
                num_tokens=facts["num_tokens"],
                num_targets=facts["num_targets"],
                fill=facts["num_tokens"] / max(facts["num_rows"] * facts["sequence_length"], 1),
                lengths=facts.get("lengths", {}),
            )
        )
    return summaries


def table(summaries: Sequence[SourceSummary]) -> str:
    """Format the figures as lines of plain text: a table within 80 columns, then what to know of each source."""
    rows: list[tuple[str, ...]] = [("source", "rows", "examples", "dropped", "truncated", "tokens", "targets", "fill")]
    for one in summaries:
        counts = (one.num_read, one.num_kept, sum(one.dropped.values()), one.truncated, one.num_tokens)
        share = one.num_targets / max(one.num_tokens, 1)
        rows.append((_short(one), *(f"{count:,}" for count in counts), f"{share:.1%}", f"{one.fill:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([*lines, *(line for one in summaries for line in _about(one))])


def _short(one: SourceSummary) -> str:
    return one.where.removeprefix("data.")


def _about(one: SourceSummary) -> Iterator[str]:
    yield f"{_short(one)}: {one.path}"
    yield f"  {one.how}"
    if one.lengths:
        half, most, longest = (f"{one.lengths[percent]:,}" for percent in ("50", "95", "100"))
        yield f"  tokens of an example: half of them up to {half}, 95% up to {most}, the longest {longest}"
    for reason, count in one.dropped.items():
        yield f"  {count:,} dropped: {reason}"


def overview(sources: Sequence[Source], prepared: Prepared, tokenizer: Any) -> str:
    """Return the table, and the first example."""
    return f"{table(summarise(sources, prepared))}\nfor example:\n{plain(next(examples(prepared, tokenizer)))}"


def examples(prepared: Prepared, tokenizer: Any) -> Iterator[list[Part]]:
    """Yield every example as trained, sources in turn, in the order of their shards; whole rows for ``wrapped``."""
    each = [_examples(PackedRows([directory]), tokenizer) for directory in prepared.directories]
    while each:
        for one in list(each):
            if (example := next(one, None)) is not None:
                yield example
            else:
                each.remove(one)


def _examples(rows: PackedRows, tokenizer: Any) -> Iterator[list[Part]]:
    for index in range(len(rows)):
        row = rows.row(index)
        begins = [*np.flatnonzero(row.starts[: row.length]).tolist(), row.length]
        for begin, end in pairwise(begins):
            yield parts(tokenizer, row.input_ids[begin:end].tolist(), row.targets[begin:end].tolist())


def parts(tokenizer: Any, ids: Sequence[int], targets: Sequence[bool]) -> list[Part]:
    """Decode ids in stretches that are targets or not."""
    edges = [i for i in range(1, len(ids)) if targets[i] != targets[i - 1]]
    stretches: list[Part] = []
    before = ""
    for begin, end in zip([0, *edges], [*edges, len(ids)], strict=True):
        # Decoded with all that precedes it, because tokens are not always whole characters, nor words with their space.
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        stretches.append(Part(_visible(text[len(before) :]), targets[begin]))
        before = text
    return stretches


def plain(example: Iterable[Part]) -> str:
    """Format an example with its targets in double brackets."""
    return "".join(f"{OPEN}{part.text}{CLOSE}" if part.is_target else part.text for part in example)


def _visible(text: str) -> str:
    """Escape line breaks, tabs and other control characters; write a dot for spaces that are not between words."""
    lines = text.split("\n")
    shown: list[str] = []
    for line in lines:
        start = len(line) - len(line.lstrip(" "))
        end = len(line.rstrip(" ")) if start < len(line) else len(line)
        inner = line[start:end]
        while "  " in inner:
            at = inner.index("  ")
            run = len(inner[at:]) - len(inner[at:].lstrip(" "))
            inner = inner[:at] + _SPACE * run + inner[at + run :]
        whole = _SPACE * start + inner + _SPACE * (len(line) - end)
        shown.append("".join(c if c.isprintable() or c == "\ufffd" else repr(c)[1:-1] for c in whole))
    return "\\n\n".join(shown)

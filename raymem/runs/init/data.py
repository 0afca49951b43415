"""Looks at data for a recipe that is to be written: columns, how the texts are rendered, lengths, a second file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from raymem.errors import DataError
from raymem.recipe.data import Source
from raymem.recipe.paths import is_local
from raymem.training.data.encode import Encoder
from raymem.training.data.formats import Format, Messages, resolve_format, to_example
from raymem.training.data.guess import guess
from raymem.training.data.packed.dropped import percentiles
from raymem.training.data.pairs import Rendering, resolve_template
from raymem.training.data.readers import Block, read_block
from raymem.training.data.rows.tables import Row
from raymem.training.data.sources.opened import OpenedSource, files_of, is_hub, open_source

_BLOCK_ROWS = 2048
_BLOCKS, _ROWS_OF_EACH = 8, 250
_HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")


@dataclass(frozen=True)
class DataFacts:
    """Facts about a source, found by reading some of its rows."""

    source: Source
    """With its format and columns said."""
    template: Rendering
    """What becomes of the texts; ``auto`` where some prompts hold the template's marks and others do not."""
    columns: list[str]
    num_rows: int
    lengths: dict[str, int]
    """Percentile of the examples that were read, 50, 95 and 100 -> their tokens."""
    mean_length: float
    """Tokens of an example."""

    @property
    def row_format(self) -> Format:
        """The format of its rows."""
        assert self.source.format != "auto"
        return self.source.format


def look_at(path: str, tokenizer: Any, where: str, cache_dir: Path, split: str | None = None) -> DataFacts:
    """Find out what a source consists of.

    Args:
        tokenizer: as :func:`raymem.training.data.tokenizer.load_tokenizer` gives it.
        where: what errors call it.
        cache_dir: for plain copies of compressed and remote files.

    Raises:
        DataError: it cannot be read, or its columns say nothing; ModelError: the tokenizer lacks what it needs.
    """
    opened = open_source(Source(path=path, split=split), where, cache_dir, _BLOCK_ROWS)
    source = _with_columns(Source(path=path, split=split), opened.first_row, where)
    assert source.format != "auto"
    template = resolve_template(source, source.format, opened.first_row, tokenizer, where)
    encoder = Encoder(tokenizer, tokenizer.origin)
    renders = partial(encoder.renders, template)
    places, rows = zip(*_some_rows(opened), strict=True)
    examples = [
        to_example(row, source.format, source.columns, place, calls=encoder.in_template("tool_calls"), renders=renders)
        for place, row in zip(places, rows, strict=True)
    ]
    if template == "auto":  # say which it is, where all rows that were read agree
        rendered = {isinstance(example, Messages) for example in examples}
        template = "auto" if len(rendered) > 1 else "chat" if True in rendered else "none"
    lengths = Counter(len(one.input_ids) for encoded in encoder.encode(examples, places) for one in encoded)
    return DataFacts(
        source=source,
        template=template,
        columns=[str(name) for name in opened.first_row],
        num_rows=sum(block.num_rows for block in opened.blocks),
        lengths=percentiles(lengths),
        mean_length=sum(length * count for length, count in lengths.items()) / lengths.total(),
    )


def second_source(path: str) -> Source | None:
    """Return held-out data that lies beside: a split of the same directory, or a file named alike; None without any."""
    if is_hub(Source(path=path)) or "://" in path or not is_local(path):
        return None
    directory = Path(path).expanduser()
    if directory.is_dir():
        for split in _HELD_OUT:
            source = Source(path=path, split=split)
            if _exists(source):
                return source
        return None
    for word in _HELD_OUT:
        name = directory.name.replace("train", word, 1)
        if name != directory.name and directory.with_name(name).is_file():
            return Source(path=path[: len(path) - len(directory.name)] + name)
    return None


def _exists(source: Source) -> bool:
    try:
        held_out = files_of(source, "data", Path())
        return held_out != files_of(source.model_copy(update={"split": None}), "data", Path())
    except DataError:
        return False


def _with_columns(source: Source, first_row: Row, where: str) -> Source:
    try:
        return source.model_copy(update={"format": resolve_format(source, first_row, where)})
    except DataError:
        if (likely := guess(first_row)) is None:
            raise
    row_format, columns = likely
    return source.model_copy(update={"format": row_format, "columns": columns})


def _some_rows(opened: OpenedSource) -> Iterator[tuple[str, Row]]:
    for block in _spread(opened.blocks):
        yield from islice(read_block(block), _ROWS_OF_EACH)


def _spread(blocks: Sequence[Block]) -> list[Block]:
    """Return a few blocks from all over the data."""
    return [blocks[at * len(blocks) // min(_BLOCKS, len(blocks))] for at in range(min(_BLOCKS, len(blocks)))]

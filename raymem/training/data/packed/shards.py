"""Tokenises and packs a source once, into a directory of shards named by its content.

``<cache_dir>/data/<key>/`` holds Arrow IPC files with one record batch each, which readers map into memory without a
copy, and a manifest. The key covers everything that decides the rows and nothing else: not the path, the machine, or
how many tasks did the work (blocks are cut by counts of rows and bytes and are packed on their own).
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from raymem.cache import publish_entry
from raymem.errors import DataError, StorageError
from raymem.recipe.data import DataSection, Source
from raymem.storage.errors import writing
from raymem.storage.publish import digest
from raymem.training.data.encode import Encoder
from raymem.training.data.formats import (
    Example,
    Format,
    Messages,
    PromptCompletion,
    resolve_format,
    to_example,
    without_targets,
)
from raymem.training.data.mix import weights_in_rows
from raymem.training.data.packed.dropped import check_dropped, cut_before_target
from raymem.training.data.packed.facts import Counts, conclude
from raymem.training.data.packed.pack import Packed, Packing, pack
from raymem.training.data.pairs import GLUED, USUAL, Rendering, resolve_template
from raymem.training.data.readers import BLOCK_BYTES, Block, read_block
from raymem.training.data.sources import OpenedSource, open_sources
from raymem.training.data.sources.index import IndexFiles, index_here
from raymem.training.data.sources.opened import is_hub
from raymem.training.data.sources.overlap import also_trained_on
from raymem.training.data.tokenizer import cached_tokenizer, load_tokenizer, tokenizer_key
from raymem.training.data.unread import unread

SCHEMA_VERSION = 4
"""Version of the shards; raise it with every change of a shard's contents for the same input."""
BLOCK_ROWS = 2048
_UNNAMED = ".writing-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A block to be turned into one shard; small and picklable."""

    index: int
    block: Block


MapBlocks = Callable[[Callable[[Task], Counts], Sequence[Task]], list[Counts]]


@dataclass(frozen=True)
class PreparedSource:
    """A source as rows on disk."""

    directory: Path
    weight: float
    """The number of times that an epoch takes each row, after ``data.mix``."""
    num_rows: int
    num_examples: int
    num_tokens: int
    """Tokens that are not padding."""
    num_targets: int
    """The number of loss terms."""
    dropped: int
    """Examples left out because nothing in them is to be predicted."""
    truncated: int
    """Examples that lost their end."""
    name: str | None = None
    """The name of the evaluation loss that it counts for."""
    where: str = ""
    """Where the recipe names it: ``data.train[0]``."""
    row_format: str = ""
    template: Rendering = "none"
    """What the chat template renders; see ``data.*.template``."""
    untemplated: str | None = None
    """The name that the directory would have with ``template: none``, where it is another."""


@dataclass(frozen=True)
class Prepared:
    """All sources of a split."""

    key: str
    """Names the rows and their weights: equal keys train on equal data."""
    sources: tuple[PreparedSource, ...]

    @property
    def directories(self) -> list[tuple[Path, float]]:
        """Directories and weights, as :class:`PackedRows` takes them."""
        return [(source.directory, source.weight) for source in self.sources]


def serial(fn: Callable[[Task], Counts], tasks: Sequence[Task]) -> list[Counts]:
    """Map one block after another in this process: the plain :data:`MapBlocks`."""
    return [fn(task) for task in tasks]


def prepare(
    section: DataSection,
    split: Literal["train", "eval"],
    tokenizer_path: str,
    cache_dir: Path,
    map_blocks: MapBlocks = serial,
) -> Prepared:
    """Return the rows of every source of ``split``, which are built where they do not exist yet.

    Args:
        tokenizer_path: local directory or Hugging Face id.
        cache_dir: local directory; the shards go to ``<cache_dir>/data/<key>/``.
        map_blocks: ``map`` over blocks, results in order. The function and the tasks are picklable; processes that run
            them must see the source files, the tokenizer and ``cache_dir`` under the same paths.

    Raises:
        DataError: a source is missing, malformed, empty, or has nothing to predict in too many of its examples.
        ModelError: the tokenizer cannot be loaded or lacks what the data needs.
        StorageError: ``cache_dir`` cannot be written, or is not shared with the processes of ``map_blocks``.
    """
    index = index_here(cache_dir, BLOCK_ROWS, section.max_example_bytes)
    plans = plan_sources(section, split, tokenizer_path, cache_dir, index)
    return prepare_planned(plans, section, split, cache_dir, index, map_blocks)


def prepare_planned(
    plans: Sequence[SourcePlan],
    section: DataSection,
    split: Literal["train", "eval"],
    cache_dir: Path,
    index: IndexFiles,
    map_blocks: MapBlocks = serial,
) -> Prepared:
    """Return the rows of the sources of a split that are found already; see :func:`prepare`.

    Args:
        plans: of all of them; one whose files are not on this machine must have been prepared.
        index: indexes the files with which those of an evaluation are compared.
    """
    prepared: list[PreparedSource] = []
    for plan in plans:
        if split == "eval":
            _warn_if_trained_on(plan, section, cache_dir, index)
        directory = cache_dir / "data" / plan.key
        manifest = publish_entry(directory, partial(_build, plan, map_blocks))
        facts = manifest["facts"]
        check_dropped(facts, plan.opened.where, section.max_dropped)
        prepared.append(
            PreparedSource(
                directory=directory,
                weight=plan.source.weight,
                num_rows=facts["num_rows"],
                num_examples=facts["num_examples"],
                num_tokens=facts["num_tokens"],
                num_targets=facts["num_targets"],
                dropped=facts["dropped"],
                truncated=facts["truncated"],
                name=plan.source.name,
                where=plan.opened.where,
                row_format=plan.recipe.row_format,
                template=plan.recipe.template,
                untemplated=plan.untemplated,
            )
        )
        log.info("%s: %d rows in %s", plan.opened.where, facts["num_rows"], directory)
    if split == "train":
        weights = weights_in_rows(section.mix, [(s.num_rows, s.num_tokens, s.weight) for s in prepared])
        prepared = [replace(source, weight=weight) for source, weight in zip(prepared, weights, strict=True)]
    key = digest([[source.directory.name, source.weight] for source in prepared])
    return Prepared(key, tuple(prepared))


@dataclass(frozen=True)
class EncodeSpec:
    """The part that every task of a source shares; small and picklable."""

    tokenizer_path: str
    tokenizer_key: str
    row_format: Format
    columns: dict[str, str]
    sequence_length: int
    packing: Packing
    turns: Literal["all", "last"]
    template: Rendering


@dataclass(frozen=True)
class SourcePlan:
    """A source that is found, and all that decides its rows."""

    source: Source
    opened: OpenedSource
    recipe: EncodeSpec
    key: str
    """The name of its directory."""
    untemplated: str | None

    @property
    def is_everywhere(self) -> bool:
        """Whether any machine can read it: its files have an address, or it is a data set of the hub."""
        return len(self.opened.remote) > 0 or is_hub(self.source)

    def tasks(self) -> list[Task]:
        """Return its blocks, of which each becomes a shard."""
        return [Task(index, block) for index, block in enumerate(self.opened.blocks)]

    def facts(self, results: Sequence[Counts]) -> dict[str, Any]:
        """Return the facts of its manifest from what the tasks returned; see :func:`conclude`."""
        facts = conclude(
            results, self.opened.where, self.source.path, sequence_length=self.recipe.sequence_length,
            packing=self.recipe.packing, asks=self.recipe.template == "auto",
        )  # fmt: skip
        return {**facts, "schema_version": SCHEMA_VERSION}


def plan_sources(
    section: DataSection,
    split: Literal["train", "eval"],
    tokenizer_path: str,
    cache_dir: Path,
    index: IndexFiles | None = None,
) -> list[SourcePlan]:
    """Find the sources of a split, and name the directories that :func:`prepare` will use.

    With the names a caller can first download ``<cache_dir>/data/<key>/`` from where another node has put it.

    Args:
        index: indexes the files; by default they are read here.

    Raises:
        DataError, ModelError: see :func:`prepare`.
    """
    sources = section.train if split == "train" else section.eval
    if sources is None:
        raise DataError("data.eval is not set: name at least one source to evaluate on.")
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer_hash = tokenizer_key(tokenizer)
    plans: list[SourcePlan] = []
    named = [(section.path_of(split, number), source) for number, source in enumerate(sources)]
    every = open_sources(named, cache_dir, BLOCK_ROWS, section.max_example_bytes, index)
    for (where, source), opened in zip(named, every, strict=True):
        row_format = resolve_format(source, opened.first_row, where)
        template = resolve_template(source, row_format, opened.first_row, tokenizer, where)
        recipe = EncodeSpec(
            tokenizer_path,
            tokenizer_hash,
            row_format,
            source.columns,
            section.sequence_length,
            section.packing,
            section.turns,
            template,
        )
        decides = {
            "schema": SCHEMA_VERSION,
            "blocks": [BLOCK_ROWS, BLOCK_BYTES],
            "content": opened.identity,
            "format": row_format,
            "columns": source.columns,
            "tokenizer": tokenizer_hash,
            "stops": tokenizer.stop_ids,
            "turns": section.turns,
            "sequence_length": section.sequence_length,
            "packing": section.packing,
        }
        if source.max_rows is not None:
            decides["max_rows"] = source.max_rows
        # Named only where it is not what the format itself says, as before there was a choice.
        usual = USUAL[row_format]
        key = digest(decides if template == usual else {**decides, "template": template})
        untemplated = digest(decides) if template != usual == "none" else None
        plans.append(SourcePlan(source, opened, recipe, key, untemplated))
    return plans


def _warn_if_trained_on(plan: SourcePlan, section: DataSection, cache_dir: Path, index: IndexFiles) -> None:
    train = [(section.path_of("train", number), source) for number, source in enumerate(section.train)]
    if shared := also_trained_on(plan.opened, plan.source, train, cache_dir, index):
        log.warning("%s is also trained on, so its loss says nothing about other data (%s)", plan.opened.where, shared)


def _build(plan: SourcePlan, map_blocks: MapBlocks, directory: Path) -> dict[str, Any]:
    """Write all shards of a source into ``directory`` and return the facts for its manifest."""
    tasks = plan.tasks()
    log.info("%s: tokenising %d blocks of up to %d rows", plan.opened.where, len(tasks), BLOCK_ROWS)
    results = map_blocks(partial(write_shard, plan.recipe, str(directory)), tasks)
    plan.opened.check_unchanged()
    for left in directory.glob(f"{_UNNAMED}*"):  # by tasks that were killed
        left.unlink(missing_ok=True)
    for shard in (result["shard"] for result in results):
        if shard is not None and not (directory / shard).is_file():
            raise StorageError(
                f"{directory / shard} was written by another process but is not here: set storage.path to a directory "
                f"that all nodes share."
            )
    return plan.facts(results)


def write_shard(recipe: EncodeSpec, directory: str, task: Task) -> Counts:
    """Read, encode and pack one block and write its shard.

    Returns:
        plain values; ``shard``: the file's name in ``directory``, or None where the block gave no row; ``unread``: how
        often the rows hold what is not read; ``noted``: what else is worth a warning; ``reasons``: why examples were
        dropped; ``lengths``: how many examples have how many tokens before they are cut.
    """
    tokenizer = cached_tokenizer(recipe.tokenizer_path, recipe.tokenizer_key)
    encoder = Encoder(tokenizer, tokenizer.origin, recipe.turns)
    calls = encoder.in_template("tool_calls")
    read: list[Example] = []
    places: list[str] = []
    beside: Counter[str] = Counter()
    renders = partial(encoder.renders, recipe.template)
    glued = 0
    for where, row in read_block(task.block):
        example = to_example(row, recipe.row_format, recipe.columns, where, calls=calls, renders=renders)
        as_turns = isinstance(example, Messages)
        beside.update(unread(row, recipe.row_format, recipe.columns, encoder.in_template, as_turns=as_turns))
        if isinstance(example, PromptCompletion):
            glued += not encoder.has_template and encoder.starts_word(example.prompt, example.completion)
        read.append(example)
        places.append(where)
    encoded = encoder.encode(read, places)
    reasons = Counter(
        without_targets(example)
        for example, (first, *_) in zip(read, encoded, strict=True)
        if not first.targets[1:].any()
    )
    examples = [example for of_row in encoded for example in of_row]
    packed = pack(examples, recipe.sequence_length, recipe.packing, encoder.pad_id)
    if cut_off := packed.dropped - reasons.total():
        reasons[cut_before_target(recipe.sequence_length)] = cut_off
    name = f"shard-{task.index:06d}.arrow" if len(packed.lengths) else None
    if name is not None:
        _write_arrow(packed, Path(directory) / name)
    return {
        "shard": name,
        "num_read": len(read),
        "num_examples": len(examples),
        "num_turns": encoder.num_turns,
        "num_rows": len(packed.lengths),
        "num_tokens": int(packed.lengths.sum()),
        "num_targets": int(packed.targets.sum()),
        "dropped": packed.dropped,
        "truncated": packed.truncated,
        "rendered": sum(isinstance(example, Messages) for example in read),
        "taken_as_it_is": sum(isinstance(example, PromptCompletion) and bool(example.completion) for example in read),
        "unread": dict(beside),
        "noted": encoder.noted + Counter({GLUED: glued}),
        "reasons": dict(reasons),
        "lengths": Counter(len(example.input_ids) for example in examples),
    }


def _write_arrow(packed: Packed, path: Path) -> None:
    import pyarrow as pa

    def rows(values_NS: npt.NDArray[Any]) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(values_NS.reshape(-1)), values_NS.shape[1])

    batch = pa.record_batch(
        {
            "input_ids": rows(packed.input_ids),
            # Bytes, because Arrow's own booleans are single bits and could not be mapped as a numpy array.
            "targets": rows(packed.targets.view(np.uint8)),
            "starts": rows(packed.starts.view(np.uint8)),
            "length": pa.array(packed.lengths),
            "num_targets": pa.array(packed.targets.sum(axis=1, dtype=np.int32)),
        }
    )
    # A lost task is started again while the first one may still be writing: each writes its own file, the name comes
    # last.
    unnamed = path.with_name(f"{_UNNAMED}{path.name}-{uuid.uuid4().hex}")
    with writing(path):
        with pa.OSFile(str(unnamed), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        unnamed.replace(path)

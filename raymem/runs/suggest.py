"""Finds a prompt in a run's own data, with which its result can be tried at once."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

from raymem.errors import RaymemError
from raymem.recipe.data import DataSection
from raymem.runs.prepare import Split
from raymem.storage.storage import Storage
from raymem.training.data.chat.template import Template
from raymem.training.data.formats import Example, Messages, PromptCompletion, resolve_format, to_example
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shards import BLOCK_ROWS, Prepared
from raymem.training.data.packed.shared import cache_dir
from raymem.training.data.sources import open_sources
from raymem.training.data.sources.index import IndexFiles
from raymem.training.data.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

_QUESTION = "aqqa"
_TEXT_TOKENS = 8
"""Tokens of a plain text that are a prompt to go on from."""


@dataclass(frozen=True)
class Suggestion:
    """A prompt as the run's examples have it."""

    prompt: str
    raw: bool
    """Whether the tokenizer has a chat template, but the examples were not rendered with it."""
    system: str | None = None


def suggest(
    section: DataSection, split: Split, data: Prepared, tokenizer: str, storage: Storage, index: IndexFiles
) -> Suggestion | None:
    """Return the prompt of the first example of a split; None where there is none to be had.

    Args:
        data: the split, prepared.
        tokenizer: its directory.
        index: knows the data's files, see :func:`raymem.runs.prepare.index_of`.
    """
    try:
        loaded = load_tokenizer(tokenizer)
        template = Template(loaded, tokenizer)
        row = PackedRows(data.directories).row(0)
        ids = row.input_ids[: row.length].tolist()
        raw = template.exists and _mark(template) not in str(loaded.decode(ids))
        example = _first_example(section, split, storage, index)
    except (RaymemError, OSError) as error:  # the run is done; that its data are gone by now is no matter
        log.info("no prompt to suggest: %s", error)
        return None
    if isinstance(example, Messages):
        turns = [turn for turn in example.messages if isinstance(turn.get("content"), str)]
        asked = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
        system = turns[0]["content"] if turns and turns[0]["role"] == "system" else None
        return Suggestion(asked, raw, None if raw else system) if asked.strip() else None
    if isinstance(example, PromptCompletion) and example.prompt.strip():
        return Suggestion(example.prompt, raw)
    begin = str(loaded.decode(ids[:_TEXT_TOKENS], skip_special_tokens=True))
    return Suggestion(begin, template.exists) if begin.strip() else None


def _first_example(section: DataSection, split: Split, storage: Storage, index: IndexFiles) -> Example:
    """Read the first row of a split. Raises DataError."""
    source = (section.train if split == "train" else section.eval or section.train)[0]
    where = section.path_of(split, 0)
    (opened,) = open_sources([(where, source)], cache_dir(storage), BLOCK_ROWS, section.max_example_bytes, index)
    row_format = resolve_format(source, opened.first_row, where)
    return to_example(opened.first_row, row_format, source.columns, opened.first_place)


def _mark(template: Template) -> str:
    """Return a text that each rendering has: what prompts for an answer, or else what stands before a question."""
    asked = plain = ""
    with contextlib.suppress(Exception):  # templates raise whatever their expressions run into
        talk = [{"role": "user", "content": _QUESTION}]
        (plain,), (asked,) = template.apply([talk], None), template.apply([talk], None, add_generation_prompt=True)
    header = asked.removeprefix(plain).strip() or plain.partition(_QUESTION)[0].strip()
    return header.partition("\n")[0]

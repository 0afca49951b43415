"""Lets a model continue evaluation examples greedily, to be read beside what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch

from raymem.training.artifacts.generate import continued_all, stop_ids
from raymem.training.data.chat.template import Template
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.evaluate import EvaluationRows

MOST_TOKENS = 64
"""The longest prediction, and the longest reference beside it."""
_MORE_THAN_REFERENCE = 8
"""Tokens by which a prediction may be longer than its reference: generating is the slow part."""
_TEXT_PROMPT = 32
"""The most tokens of a plain text, all of which are targets, that become the prompt; at most half of it."""


Example = list[int]
"""Token ids, of a prompt or of what follows it."""


@dataclass(frozen=True)
class Prediction:
    """An example with a model's own continuation."""

    prompt: str
    """All that the model reads, special tokens included."""
    prediction: str
    reference: str
    """What the example says there, cut after :data:`MOST_TOKENS` tokens."""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def predict(
    model: Any, rows: EvaluationRows, tokenizer: Any, count: int, *, micro_batch: int, mixed: bool
) -> list[Prediction]:  # fmt: skip
    """Continue the first ``count`` examples, one from each name in turn, each up to its first stretch of targets.

    Args:
        model: in evaluation mode afterwards as before.
        micro_batch: examples that are continued at once.
        mixed: run it under bf16 autocast.
    """

    def length(reference: Example) -> int:
        return min(MOST_TOKENS, len(reference) + _MORE_THAN_REFERENCE)

    sets = list(rows.values()) if isinstance(rows, Mapping) else [rows]
    examples = islice(_in_turn([_examples(one) for one in sets]), count)
    batches = _continued(
        model,
        tokenizer,
        examples,
        lambda references: max(map(length, references)),
        micro_batch=micro_batch,
        mixed=mixed,
    )
    return [
        Prediction(
            str(tokenizer.decode(prompt, skip_special_tokens=False)),
            str(tokenizer.decode(new[: length(reference)], skip_special_tokens=True)),
            str(tokenizer.decode(reference[:MOST_TOKENS], skip_special_tokens=True)),
        )
        for prompt, reference, new in batches
    ]


def answers(
    model: Any, rows: PackedRows, tokenizer: Any, *, micro_batch: int, mixed: bool, progress: Callable[[], None]
) -> list[tuple[str, str]]:  # fmt: skip
    """Let a model answer every example, in batches, greedily: (answer, reference) of each.

    An answer ends where the model ends it, at the latest after twice the tokens of the longest reference of its batch
    and :data:`MOST_TOKENS` more, or where the model's context does.

    Args:
        model: in evaluation mode afterwards as before.
        mixed: run it under bf16 autocast.
        progress: called before each batch.
    """

    def most(references: Sequence[Example]) -> int:
        return 2 * max(map(len, references)) + MOST_TOKENS

    batches = _continued(
        model, tokenizer, _examples(rows), most, micro_batch=micro_batch, mixed=mixed, progress=progress
    )
    return [(_text(tokenizer, new), _text(tokenizer, reference)) for _, reference, new in batches]


def _continued(
    model: Any, tokenizer: Any, examples: Iterator[tuple[Example, Example]],
    most: Callable[[Sequence[Example]], int], *,
    micro_batch: int, mixed: bool, progress: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Example, Example, Example]]:  # fmt: skip
    """Yield (prompt, reference, what the model says) of each example, batch by batch.

    Args:
        most: returns the longest continuation, in tokens, of a batch with these references.
    """
    stops = stop_ids(model, tokenizer, Template(tokenizer, ""))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    was_training, device = model.training, next(model.parameters()).device.type
    model.eval()
    try:
        while batch := list(islice(examples, micro_batch)):
            progress()
            prompts, references = zip(*batch, strict=True)
            length = most(references)
            if isinstance(context, int) and context > 0:
                length = max(1, min(length, context - max(map(len, prompts))))
            with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
                new = continued_all(model, tokenizer, prompts, stops, max_new_tokens=length)
            yield from zip(prompts, references, new, strict=True)
    finally:
        model.train(was_training)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _in_turn(each: list[Iterator[tuple[Example, Example]]]) -> Iterator[tuple[Example, Example]]:
    while each:
        for one in list(each):
            if (example := next(one, None)) is not None:
                yield example
            else:
                each.remove(one)


def _examples(rows: PackedRows) -> Iterator[tuple[Example, Example]]:
    """Yield the ids of each example before its first target, and of the targets there; of a plain text its beginning
    and the rest.
    """
    for index in range(len(rows)):
        row = rows.row(index)
        for begin, end in pairwise([*np.flatnonzero(row.starts[: row.length]).tolist(), row.length]):
            ids, targets = row.input_ids[begin:end].tolist(), row.targets[begin:end]
            first, last = _first_stretch(targets.tolist())
            if first == 1 and last > 2:  # behind a begin token, or the token that nothing precedes: a plain text
                first = min(_TEXT_PROMPT, last // 2)
            if 0 < first < last:
                yield ids[:first], ids[first:last]


def _first_stretch(targets: Sequence[bool]) -> tuple[int, int]:
    """Return begin and end of the first targets in a row; (0, 0) if there is none."""
    if True not in targets:
        return 0, 0
    first = targets.index(True)
    rest = list(targets[first:])
    return first, first + (rest.index(False) if False in rest else len(rest))

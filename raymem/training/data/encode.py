"""Encodes examples as token ids, with marks of those that are to be predicted.

An example is a list of *pieces* of text, each a target or not. Ids must be those that the model will see when it
generates, where the text before a target is tokenised as a whole, without the target. So every piece is tokenised as
the continuation of what precedes it: the ids of the joint text if they begin with those of the text before, otherwise
(a token would reach across the boundary) ids of its own. Where that leaves a later target behind other ids than the
text before it has alone, the example is cut in two, and the later half begins with that text anew.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from raymem.errors import DataError, ModelError
from raymem.training.data.chat.conversation import Chat, Piece
from raymem.training.data.chat.template import Template
from raymem.training.data.formats import Example, Messages, PromptCompletion, Text
from raymem.training.data.packed.pack import Encoded
from raymem.training.data.rows.json_text import half_character
from raymem.training.data.tokens import Tokens

# A SentencePiece tokenizer puts a space in front of a text that stands alone, but not after a line break.
_ANCHOR = "\n"
# Offsets take about a hundred bytes per token, so not too much is tokenised at once.
_BATCH_CHARS = 1 << 20
_SHORT_CHARS, _MOST_SHORT = 100, 10_000


class Encoder:
    """Encodes examples with one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        name: what to call it in errors.
        turns: which of the assistant's turns are targets.

    Raises:
        ModelError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, name: str, turns: Literal["all", "last"] = "all") -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"tokenizer {name} has no eos_token: write one into its tokenizer_config.json, or set model.tokenizer "
                f"to one that has."
            )
        self._backend = tokenizer.backend_tokenizer
        self._eos = int(tokenizer.eos_token_id)
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and self._backend.encode("a").ids[:1] == [bos]
        self._begin: list[int] = [bos] if adds_bos else []
        self._template = Template(tokenizer, name)
        self._chat = Chat(self._template, turns)
        self._is_added = np.zeros(max([*tokenizer.added_tokens_decoder, len(tokenizer)]) + 1, np.bool_)
        self._is_added[list(tokenizer.added_tokens_decoder)] = True
        self._short: dict[str, list[int]] = {}
        self.pad_id = self._eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    @cached_property
    def _vocabulary(self) -> int:
        """The upper limit of ids, which are all below it."""
        return int(max(self._backend.get_vocab().values())) + 1

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._template.exists

    def in_template(self, key: str) -> bool:
        """Say whether the chat template mentions a key of a message, or ``tools``."""
        return self._template.reads(key)

    def renders(self, template: Literal["auto", "chat", "none"], prompt: str) -> bool:
        """Say whether a prompt in text and its answer become turns; see ``data.*.template``."""
        return template == "chat" or (template == "auto" and not self._template.is_in(prompt))

    def starts_word(self, prompt: str, answer: str) -> bool:
        """Say whether the answer goes on where the prompt ends without anything between, as if in the same word."""
        if not prompt or not answer[:1].isalnum() or prompt[-1:].isspace():
            return False
        is_wide = unicodedata.east_asian_width(answer[0]) in "WF"  # scripts that put no spaces between words
        return not is_wide and not self._template.ends_with_token(prompt)

    @property
    def num_turns(self) -> int:
        """The number of assistant turns that became targets so far."""
        return self._chat.num_turns

    @property
    def noted(self) -> Counter[str]:
        """Counts of events so far that are worth a warning; see :class:`Chat`."""
        return self._chat.noted

    def encode(self, examples: Sequence[Example], places: Sequence[str]) -> list[list[Encoded]]:
        """Return ids and targets of examples, however long; a conversation may give several, everything else gives one.

        Text: all tokens, with an end token. Prompt and completion: the completion and an end token. Messages: the
        assistant's turns up to the token that stops generation, but for the silent ones (see :class:`Chat`). An empty
        text or completion has no targets: an answer that got lost is likelier than one that ought to be empty. Begin
        tokens are added where the tokenizer itself does so and the text does not begin with one, and are never targets
        there. Token ids are taken as they are.

        Args:
            places: where each example stands, for errors.

        Raises:
            DataError: the chat template does not render a conversation, or a text is no valid Unicode; begins with the
                place.
            ModelError: the tokenizer has no chat template.
        """
        encoded: list[list[Encoded]] = [[] for _ in examples]
        for of_row, example, where in zip(encoded, examples, places, strict=True):
            if isinstance(example, Tokens):
                of_row.append(example.encoded(self._vocabulary, where))
        for batch in _batches(self._sequences(examples, places)):
            texts = ["".join(text for text, _ in pieces) for _, pieces in batch]
            for (row, pieces), text, encoding in zip(batch, texts, self._encode_batch(texts), strict=True):
                end = not isinstance(examples[row], Messages)
                for ids, targets in self._located(pieces, text, encoding) or self._piece_by_piece(pieces):
                    encoded[row].append(
                        self._finished(ids, targets, end=end, splittable=isinstance(examples[row], Text))
                    )
        return encoded

    def _sequences(self, examples: Sequence[Example], places: Sequence[str]) -> Iterator[tuple[int, list[Piece]]]:
        for row, (example, where) in enumerate(zip(examples, places, strict=True)):
            sequences: list[list[Piece]]
            if isinstance(example, Messages):
                sequences = self._chat.pieces(example, where)
            elif isinstance(example, PromptCompletion):
                sequences = [[(example.prompt, False), (example.completion, True)]]
            elif isinstance(example, Text):
                sequences = [[(example.text, True)]]
            else:
                continue  # token ids, which are taken as they are
            for pieces in sequences:
                _check_unicode("".join(text for text, _ in pieces), where)
                yield row, pieces

    def _encode_batch(self, texts: list[str]) -> list[Any]:
        return list(self._backend.encode_batch(texts, add_special_tokens=False))

    def _located(
        self, pieces: list[Piece], text: str, encoding: Any
    ) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]] | None:
        """Return the ids of the joint text, if the text before every boundary has the same ids alone; otherwise None.

        What precedes an added token has no influence on the ids behind it, so the text from the last one on is enough.
        """
        ids = np.array(encoding.ids, np.int32)
        targets = np.zeros(len(ids), np.bool_)
        added: npt.NDArray[np.int64] | None = None
        at = begin = 0
        for piece, is_target in pieces[:-1]:
            at += len(piece)
            if added is None:
                added = np.flatnonzero(self._is_added[ids])
            first, start = _last_before(at, added, encoding)
            alone = self._ids(text[start:at])
            end = first + len(alone)
            if ids[first:end].tolist() != alone or end < begin:
                return None
            targets[begin:end] = is_target
            begin = end
        targets[begin:] = pieces[-1][1] if pieces else False
        return [(ids, targets)]

    def _piece_by_piece(self, pieces: list[Piece]) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        """Encode piece by piece, for texts in which a token reaches across a boundary."""
        done: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]] = []
        text = ""
        ids: list[int] = []
        targets: list[bool] = []
        for number, (piece, is_target) in enumerate(pieces):
            if is_target:
                alone = self._ids(text)
                if alone[: len(ids)] != ids and any(targets):
                    done.append((np.array(ids, np.int32), np.array(targets, np.bool_)))
                    ids, targets = alone, [False] * len(alone)
                ids, targets = alone, targets + [False] * (len(alone) - len(ids))
                ids = ids + (added := self._continue(text, ids, piece))
                targets += [True] * len(added)
            elif number == len(pieces) - 1:
                added = self._continue(text, ids, piece)
                ids, targets = ids + added, targets + [False] * len(added)
            text += piece
        return [*done, (np.array(ids, np.int32), np.array(targets, np.bool_))]

    def _continue(self, text: str, ids: list[int], piece: str) -> list[int]:
        """Return the ids of ``piece`` after ``text``, whose ids are ``ids``."""
        joint = self._ids(text + piece)
        if joint[: len(ids)] == ids:
            return joint[len(ids) :]
        anchor, anchored = self._ids(_ANCHOR), self._ids(_ANCHOR + piece)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else self._ids(piece)

    def _finished(
        self, ids: npt.NDArray[np.int32], targets: npt.NDArray[np.bool_], *, end: bool, splittable: bool
    ) -> Encoded:
        """Add begin and end tokens.

        Args:
            end: the tokenizer's begin and end tokens are ours to add; a chat template writes its own.
        """
        if self._begin:
            written = next((i for i, token in enumerate(ids) if token != self._begin[0]), len(ids))
            begin = self._begin if end or written else []
            ids = np.concatenate([np.array(begin, np.int32), ids[written:]])
            targets = np.concatenate([np.zeros(len(begin), np.bool_), targets[written:]])
        if end and targets.any() and ids[-1] != self._eos:
            ids, targets = np.append(ids, np.int32(self._eos)), np.append(targets, np.True_)
        return Encoded(ids, targets, splittable)

    def _ids(self, text: str) -> list[int]:
        known = self._short.get(text)
        if known is None:
            known = list(self._backend.encode(text, add_special_tokens=False).ids)
            if len(text) <= _SHORT_CHARS and len(self._short) < _MOST_SHORT:
                self._short[text] = known
        return known


def _batches(sequences: Iterator[tuple[int, list[Piece]]]) -> Iterator[list[tuple[int, list[Piece]]]]:
    batch: list[tuple[int, list[Piece]]] = []
    chars = 0
    for row, pieces in sequences:
        batch.append((row, pieces))
        chars += sum(len(text) for text, _ in pieces)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _last_before(at: int, added: npt.NDArray[np.int64], encoding: Any) -> tuple[int, int]:
    """Return index and position of the last added token that begins before character ``at``; the start if none does."""
    low, high = 0, len(added)
    while low < high:
        middle = (low + high) // 2
        if encoding.token_to_chars(int(added[middle]))[0] < at:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return 0, 0
    first = int(added[low - 1])
    return first, int(encoding.token_to_chars(first)[0])


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds {half_character(error)}.") from error

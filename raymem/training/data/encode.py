"""Examples -> token ids and which of them are to be predicted.

An example is a list of *pieces* of text, each a target or not. Ids must be those that the model will see when it
generates, where the text before a target is tokenised alone. So every piece is tokenised as the continuation of what
precedes it: the ids of the joint text if they begin with the ids so far, otherwise (a token would reach across the
boundary) ids of its own.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import numpy as np

from raymem.errors import DataError, ModelError
from raymem.training.data.formats import Example, Messages, PromptCompletion, Text
from raymem.training.data.pack import Encoded
from raymem.training.data.tokens import Tokens

# A SentencePiece tokenizer puts a space in front of a text that stands alone, but not after a line break.
_ANCHOR = "\n"
# transformers gives a template what stands under one of these under the others as well.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Encoder:
    """Encodes examples with one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        name: what to call it in errors.

    Raises:
        ModelError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"tokenizer {name} has no eos_token: set one in its tokenizer_config.json.")
        self._tokenizer = tokenizer
        self._name = name
        self._eos = int(tokenizer.eos_token_id)
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos]
        self._begin: list[int] = [bos] if adds_bos else []
        template = tokenizer.chat_template
        # Some tokenizers have several, by name.
        self._template = "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template or "")
        self.pad_id = self._eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    @cached_property
    def _vocabulary(self) -> int:
        """Ids are below this."""
        return int(max(self._tokenizer.get_vocab().values())) + 1

    def in_template(self, key: str) -> bool:
        """Whether the chat template speaks of a key of a message, or of ``tools``."""
        keys = _REASONING if key in _REASONING else (key,)
        return any(re.search(rf"(?<!\w){re.escape(each)}(?!\w)", self._template) for each in keys)

    def encode(self, example: Example, place: str) -> Encoded:
        """Ids and targets of one example, however long.

        Text: all tokens, with an end token. Prompt and completion: the completion and an end token. Messages: the
        assistant's turns as the chat template renders them, which includes the end of the turn, but for the silent
        ones. An empty text or completion has no targets: an answer that got lost is likelier than one that ought to be
        empty. Begin tokens are added where the tokenizer itself does so and the text does not begin with one, and are
        never targets there. Tokens are taken as they are.

        Raises:
            DataError: the chat template does not render this conversation, or the text is no valid Unicode; begins with
                ``place``.
            ModelError: the tokenizer has no chat template.
        """
        if isinstance(example, Messages):
            return self._joined(self._render_turns(example, place), place, splittable=False, end=False)
        if isinstance(example, PromptCompletion):
            pieces = [(example.prompt, False), (example.completion, True)]
            return self._joined(pieces, place, splittable=False, end=True)
        if isinstance(example, Tokens):
            return example.encoded(self._vocabulary, place)
        assert isinstance(example, Text)
        return self._joined([(example.text, True)], place, splittable=True, end=True)

    def _joined(self, pieces: list[tuple[str, bool]], place: str, *, splittable: bool, end: bool) -> Encoded:
        """Ids of all pieces.

        Args:
            end: the tokenizer's begin and end tokens are ours to add; a chat template writes its own.
        """
        _check_unicode("".join(piece for piece, _ in pieces), place)
        text = ""
        ids: list[int] = []
        targets: list[bool] = []
        for piece, is_target in pieces:
            added = self._continue(text, ids, piece)
            text += piece
            ids += added
            targets += [is_target] * len(added)
        if self._begin:
            written = next((i for i, token in enumerate(ids) if token != self._begin[0]), len(ids))
            begin = self._begin if end or written else []
            ids, targets = begin + ids[written:], [False] * len(begin) + targets[written:]
        if end and any(targets) and ids[-1:] != [self._eos]:
            ids.append(self._eos)
            targets.append(True)
        return Encoded(np.array(ids, np.int32), np.array(targets, np.bool_), splittable)

    def _continue(self, text: str, ids: list[int], piece: str) -> list[int]:
        """Ids of ``piece`` after ``text``, whose ids are ``ids``."""
        joint = self._ids(text + piece)
        if joint[: len(ids)] == ids:
            return joint[len(ids) :]
        anchor, anchored = self._ids(_ANCHOR), self._ids(_ANCHOR + piece)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else self._ids(piece)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _render_turns(self, example: Messages, place: str) -> list[tuple[str, bool]]:
        """The rendered conversation in pieces; the assistant's turns are targets.

        Stock templates do not mark these turns. They are found by rendering the conversation up to each of them, with
        and without the turn itself, which is only right if a template renders the beginning of a conversation
        regardless of what follows.
        """
        if self._tokenizer.chat_template is None:
            raise ModelError(
                f"{place} is a conversation, but tokenizer {self._name} has no chat template: set model.tokenizer to "
                f"one that has (for example that of the model's instruct version), or use format prompt_completion."
            )
        messages, tools = self._with_contents(example, place), example.tools
        full = self._render(messages, tools, place)
        pieces: list[tuple[str, bool]] = []
        at = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index in example.silent or self._lost(example.messages[index]):
                continue
            before = self._render(messages[:index], tools, place, add_generation_prompt=True)
            after = self._render(messages[: index + 1], tools, place)
            if not (full.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{place} messages[{index}]: the chat template of tokenizer {self._name} renders this turn "
                    f"differently once more turns follow, so its tokens cannot be told apart: end every conversation "
                    f"with its first assistant turn, or use a tokenizer with a plain chat template."
                )
            pieces += [(full[at : len(before)], False), (full[len(before) : len(after)], True)]
            at = len(after)
        return [*pieces, (full[at:], False)]

    def _lost(self, message: dict[str, Any]) -> bool:
        """Whether a turn consists of calls only and the template does not write them, so that it would be empty."""
        calls = [key for key in ("tool_calls", "function_call") if message.get(key)]
        return bool(calls) and not message["content"] and not any(map(self.in_template, calls))

    def _with_contents(self, example: Messages, place: str) -> list[dict[str, Any]]:
        """The messages; a content that is None becomes "" where the template would fail or write None into the text."""
        messages = example.messages
        if all(message["content"] is not None for message in messages):
            return messages
        filled = [m if m["content"] is not None else m | {"content": ""} for m in messages]
        rendered = self._render(filled, example.tools, place)
        try:
            as_they_are = self._render(messages, example.tools, place)
        except DataError:
            return filled
        return filled if as_they_are.count("None") > rendered.count("None") else messages

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        place: str,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise whatever their expressions run into
            roles = ", ".join(message["role"] for message in messages) or "none"
            raise DataError(
                f"{place}: the chat template of tokenizer {self._name} refuses the turns {roles} ({error}): reorder "
                f"them as it demands."
            ) from error
        return str(rendered)


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(error.start - 20, 0) : error.start]
        raise DataError(
            f"{place} holds {text[error.start]!a} after {near!a}, which is half of a character (a lone surrogate, as "
            f"where an emoji was cut in two): remove it, or write the whole character."
        ) from error

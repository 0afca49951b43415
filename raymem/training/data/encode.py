"""Examples -> token ids and which of them are to be predicted.

An example is a list of *pieces* of text, each a target or not. Ids must be those that the model will see when it
generates, where the text before a target is tokenised alone. So every piece is tokenised as the continuation of what
precedes it: the ids of the joint text if they begin with the ids so far, otherwise (a token would reach across the
boundary) ids of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from raymem.errors import DataError, ModelError
from raymem.training.data.formats import Example, Messages, PromptCompletion, Text
from raymem.training.data.pack import Encoded

# A SentencePiece tokenizer puts a space in front of a text that stands alone, but not after a line break.
_ANCHOR = "\n"


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
        self.pad_id = self._eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def encode(self, example: Example, place: str) -> Encoded:
        """Ids and targets of one example, however long.

        Text: all tokens, with an end token. Prompt and completion: the completion and an end token. Messages: the
        assistant's turns as the chat template renders them, which includes the end of the turn. An empty text or
        completion has no targets: an answer that got lost is likelier than one that ought to be empty. Begin tokens are
        added where the tokenizer itself does so, and are never targets.

        Raises:
            DataError: the chat template does not render this conversation; begins with ``place``.
            ModelError: the tokenizer has no chat template.
        """
        if isinstance(example, Messages):
            return self._joined(self._render_turns(example.messages, place), [], splittable=False, end=False)
        if isinstance(example, PromptCompletion):
            pieces = [(example.prompt, False), (example.completion, True)]
            return self._joined(pieces, self._begin, splittable=False, end=True)
        assert isinstance(example, Text)
        return self._joined([(example.text, True)], self._begin, splittable=True, end=True)

    def _joined(self, pieces: list[tuple[str, bool]], begin: list[int], *, splittable: bool, end: bool) -> Encoded:
        text = ""
        ids: list[int] = []
        targets = [False] * len(begin)
        for piece, is_target in pieces:
            added = self._continue(text, ids, piece)
            text += piece
            ids += added
            targets += [is_target] * len(added)
        if end and any(targets) and ids[-1:] != [self._eos]:
            ids.append(self._eos)
            targets.append(True)
        return Encoded(np.array(begin + ids, np.int32), np.array(targets, np.bool_), splittable)

    def _continue(self, text: str, ids: list[int], piece: str) -> list[int]:
        """Ids of ``piece`` after ``text``, whose ids are ``ids``."""
        joint = self._ids(text + piece)
        if joint[: len(ids)] == ids:
            return joint[len(ids) :]
        anchor, anchored = self._ids(_ANCHOR), self._ids(_ANCHOR + piece)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else self._ids(piece)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _render_turns(self, messages: list[dict[str, Any]], place: str) -> list[tuple[str, bool]]:
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
        full = self._render(messages, place)
        pieces: list[tuple[str, bool]] = []
        at = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], place, add_generation_prompt=True)
            after = self._render(messages[: index + 1], place)
            if not (full.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{place} messages[{index}]: the chat template of tokenizer {self._name} renders this turn "
                    f"differently once more turns follow, so its tokens cannot be told apart: end every conversation "
                    f"with its first assistant turn, or use a tokenizer with a plain chat template."
                )
            pieces += [(full[at : len(before)], False), (full[len(before) : len(after)], True)]
            at = len(after)
        return [*pieces, (full[at:], False)]

    def _render(self, messages: list[dict[str, Any]], place: str, *, add_generation_prompt: bool = False) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise whatever their expressions run into
            roles = ", ".join(message["role"] for message in messages) or "none"
            raise DataError(
                f"{place}: the chat template of tokenizer {self._name} refuses the turns {roles} ({error}): reorder "
                f"them as it demands."
            ) from error
        return str(rendered)

"""Wraps a tokenizer's chat template: renders, explains its refusals, and knows the tokens with which it ends a turn."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from raymem.errors import DataError, ModelError
from raymem.training.data.chat.thoughts import REASONING, opens_thought, under_known_keys
from raymem.training.data.formats import Messages
from raymem.training.data.turns import roles_of, with_arguments

Turn = dict[str, Any]
Span = tuple[int, int]
"""A span of characters from the first index up to the second."""

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_QUESTION, _ANSWER = {"role": "user", "content": "aqqa"}, {"role": "assistant", "content": "awwa"}


class Template:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers with an end-of-sequence token.
        name: what to call it in errors.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.name = name
        self.exists = tokenizer.chat_template is not None
        template = tokenizer.chat_template
        # Some tokenizers have several, by name.
        self.source = "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template or "")
        self.has_marks = _MARKS.search(self.source) is not None
        """Whether the template marks what the assistant says."""
        self.end_of_sequence = str(tokenizer.eos_token)
        self.user_marker: str | None = None
        """The token that stands between an assistant's turn and a user's, if there is one."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        # Of two that begin alike the tokenizer takes the longer one.
        self._added = sorted({str(token) for token in added if str(token).strip()}, key=lambda token: -len(token))
        self._special = tuple(sorted({str(token) for token in added if token.special}))
        ids = [tokenizer.eos_token_id, *getattr(tokenizer, "stop_ids", ())]
        self.stops = {str(token) for token in tokenizer.convert_ids_to_tokens(ids)}
        """Tokens that stop generation."""
        self._prompts_for_thought = False
        if self.exists:
            self._probe()

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """What the template writes around a user's turn and nobody writes otherwise: its special tokens there, and
        words such as ``[INST]`` or ``USER:``. A prompt that holds one has been through a template already.
        """
        around = ""
        with contextlib.suppress(Exception):  # what the template demands will be said of the data
            (text,) = self.apply([[_QUESTION, _ANSWER, _QUESTION]], None)
            around = text.rpartition(_ANSWER["content"])[2].partition(_QUESTION["content"])[0]
        tokens = [token for token in self._special if token in around]
        for token in tokens:
            around = around.replace(token, "\n")
        words = [word for line in around.splitlines() if len(word := line.strip()) > 2 and not word.isalnum()]
        return (*tokens, *words) or self._special

    def is_in(self, prompt: str) -> bool:
        """Say whether a prompt holds the template's marks already."""
        return any(mark in prompt for mark in self.marks)

    def reads(self, key: str) -> bool:
        """Say whether the template mentions a key of a message, or ``tools``; or, for reasoning, prompts for it."""
        if key not in REASONING:
            return self._speaks_of(key)
        # What stands under one of these keys is given to a template under the others as well.
        return self._prompts_for_thought or any(map(self._speaks_of, REASONING))

    def _speaks_of(self, word: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", self.source) is not None

    def apply(self, talks: Sequence[Sequence[Turn]], tools: Any, *, add_generation_prompt: bool = False) -> list[str]:
        """Render conversations as inference does; raises whatever the template does."""
        if not talks:
            return []
        rendered = self._tokenizer.apply_chat_template(
            [list(map(under_known_keys, talk)) for talk in talks],
            tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt,
        )  # fmt: skip
        return list(rendered)

    def render(
        self, talks: Sequence[Sequence[Turn]], tools: Any, where: str, *, add_generation_prompt: bool = False
    ) -> list[str]:
        """Render conversations as inference does.

        Raises:
            DataError: the template refuses a conversation or fails on it; begins with ``where``.
            ModelError: it is no valid template.
        """
        try:
            return self.apply(talks, tools, add_generation_prompt=add_generation_prompt)
        except Exception:  # templates raise whatever their expressions run into
            for talk in talks:
                try:
                    self.apply([talk], tools, add_generation_prompt=add_generation_prompt)
                except Exception as error:
                    raise self._refusal(error, talk, where) from error
            raise

    def whole(self, talk: Sequence[Turn], tools: Any, where: str) -> str:
        """Render a whole conversation.

        Raises:
            DataError: as :meth:`render`; or the text is empty.
            ModelError: as :meth:`render`.
        """
        (text,) = self.render([talk], tools, where)
        return self._not_empty(text, where)

    def marked(self, talk: Sequence[Turn], tools: Any, where: str) -> tuple[str, list[Span]]:
        """Render a whole conversation; return the text and the spans that the template marks as the assistant's.

        Raises:
            DataError, ModelError: as :meth:`whole`.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[[{k: v for k, v in under_known_keys(t).items() if v is not None} for t in talk]],
                tools=tools,
                chat_template=self._tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise self._refusal(error, talk, where) from error
        return self._not_empty(texts[0], where), [(begin, end) for begin, end in spans[0] if end > begin]

    def readable(self, example: Messages, where: str) -> list[Turn]:
        """Return the messages in the form that the template takes.

        A content that is None becomes "" where the template would fail or write None into the text. Arguments of calls
        that are JSON text become what it says, or the other way round, where the template fails otherwise.

        Raises:
            DataError, ModelError: as :meth:`render`.
        """
        messages = example.messages
        lacks_content = any(message["content"] is None for message in messages)
        if not (lacks_content or any(message.get("tool_calls") for message in messages)):
            return messages
        filled = [m if m["content"] is not None else m | {"content": ""} for m in messages]
        for talk in (filled, with_arguments(filled, as_text=False), with_arguments(filled, as_text=True)):
            with contextlib.suppress(Exception):
                (rendered,) = self.apply([talk], example.tools)
                break
        else:
            self.render([filled], example.tools, where)
            raise AssertionError("it was refused a moment ago")
        if talk is filled and lacks_content:
            with contextlib.suppress(Exception):  # it needs a text
                (as_they_are,) = self.apply([messages], example.tools)
                return filled if as_they_are.count("None") > rendered.count("None") else messages
        return talk if talk is not filled or lacks_content else messages

    def end_of(self, text: str) -> int | None:
        """Find the end of the token that stops generation; only text that closes a turn may follow it in ``text``."""
        at = len(text)
        first_stop = last_special = None
        while True:
            at = len(text[:at].rstrip())
            token = _at_end(self.stops, text, at)
            if token:
                first_stop = at
            else:
                token = _at_end(self._special, text, at)
                last_special = at if token and last_special is None else last_special
            if not token:
                return last_special if first_stop is None else first_stop
            at -= len(token)

    def cut(self, text: str) -> str:
        """Return the text up to the token that stops generation at its end, if there is one."""
        return text[: self.end_of(text)]

    def leading_token(self, text: str) -> str:
        """Return white space and the added token that a text begins with; "" where it begins with something else."""
        start = len(text) - len(text.lstrip())
        token = next((token for token in self._added if text.startswith(token, start)), "")
        return text[:start] + token if token else ""

    def ends_with_token(self, text: str) -> bool:
        """Say whether a text ends with an added token or a mark of the template."""
        return text.endswith((*self._added, *self.marks))

    def _probe(self) -> None:
        """Find out with a small conversation which text the template writes behind an assistant's turn."""
        for talk in ([_QUESTION, _ANSWER], [_QUESTION, _ANSWER, _QUESTION]):
            text = ""
            with contextlib.suppress(Exception):  # what the template demands will be said of the data
                (text,) = self.apply([talk], None)
            token = self.leading_token(text.rpartition(_ANSWER["content"])[2]).strip()
            if token and len(talk) == 2:
                self.stops.add(token)
            elif token:
                self.user_marker = token

        with contextlib.suppress(Exception):
            (prompt,) = self.apply([[_QUESTION]], None, add_generation_prompt=True)
            self._prompts_for_thought = opens_thought(prompt, self.source)

    def _not_empty(self, text: str, where: str) -> str:
        if not text.strip():
            raise DataError(
                f"{where}: the chat template of tokenizer {self.name} renders nothing for this conversation: set "
                f"model.tokenizer to one whose chat template writes the turns, or use format prompt_completion with "
                f"template: none."
            )
        return text

    def _refusal(self, error: Exception, talk: Sequence[Turn], where: str) -> DataError | ModelError:
        import jinja2

        words = " ".join(str(error).split()) or type(error).__name__
        subject = f"the chat template of tokenizer {self.name}"
        if isinstance(error, jinja2.TemplateSyntaxError):
            return ModelError(
                f"{subject} is no valid template (line {error.lineno}: {words}): mend its chat_template.jinja, or set "
                f"model.tokenizer to another one."
            )
        if not talk:
            return DataError(
                f"{where}: the conversation begins with a turn of the assistant, for which {subject} writes no prompt "
                f"({words}): put a user's turn before it, or mark it with weight: 0."
            )
        if type(error) is jinja2.TemplateError:  # raised by the template, in its author's words
            return DataError(
                f"{where}: {subject} refuses the turns {roles_of(talk)} ({words}): reorder or leave out turns as it "
                f"demands."
            )
        return DataError(
            f"{where}: {subject} fails on the turns {roles_of(talk)} ({type(error).__name__}: {words}): give the turns "
            f"what it reads, or set model.tokenizer to one with another template."
        )


def _at_end(tokens: Iterable[str], text: str, at: int) -> str:
    """Return the token that ends at character ``at``, or ""."""
    return next((token for token in tokens if text.endswith(token, 0, at)), "")

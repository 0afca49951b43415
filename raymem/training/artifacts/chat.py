"""A conversation with a model: its history, and what of it still fits into the model's context."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from raymem.training.artifacts.generate import ContextFull, Generated, OnText, Responder
from raymem.training.data.chat.template import Turn

_MOST_RESERVED = 4
"""At most this part of a context is kept free for an answer."""


@dataclass
class Conversation:
    """What was said so far.

    Args:
        responder: a model whose tokenizer has a chat template.
        system: the text that the conversation begins with.
    """

    responder: Responder
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    """Turns of user and assistant, by turns."""

    def say(
        self, text: str, *, max_new_tokens: int, temperature: float, on_text: OnText
    ) -> tuple[Generated | None, int]:
        """Let the model answer a user's turn, and add both to the history.

        Args:
            on_text: gets the answer in pieces as it comes.

        Returns:
            The answer, None if Ctrl-C ended it (the history then has what came until then), and how many turns at the
            beginning had to go, because they no longer fit into the model's context.

        Raises:
            ContextFull: this turn alone is longer than the context; the history stays as it was.
            ModelError, DataError: see :meth:`Responder.read_turns`; the history stays as it was.
        """
        kept, ids = self._fitting([*self.turns, {"role": "user", "content": text}], max_new_tokens)
        left_out = len(self.turns) + 1 - len(kept)
        said: list[str] = []

        def hear(piece: str) -> None:
            said.append(piece)
            on_text(piece)

        answer = None
        with contextlib.suppress(KeyboardInterrupt):
            answer = self.responder.respond(ids, max_new_tokens=max_new_tokens, temperature=temperature, on_text=hear)
        self.turns = [*kept, {"role": "assistant", "content": answer.text if answer else "".join(said)}]
        return answer, left_out

    def _fitting(self, turns: list[Turn], max_new_tokens: int) -> tuple[list[Turn], list[int]]:
        """Return the latest turns that leave room for an answer, from a user's turn on, and their ids."""
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        while True:
            try:
                ids = self.responder.read_turns([*start, *turns])
            except ContextFull:
                if len(turns) == 1:
                    raise
            else:
                context = self.responder.context
                if context is None or len(turns) == 1:
                    return turns, ids
                if len(ids) + min(max_new_tokens, context // _MOST_RESERVED) <= context:
                    return turns, ids
            turns = turns[2:]

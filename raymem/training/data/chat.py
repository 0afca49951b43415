"""Conversations -> pieces of text, each a target or not, as inference will see every turn.

For an assistant turn i, the *prompt* is the template's rendering of the turns before it with the generation prompt, and
what the model is to say is what the template writes behind it once the turn is there. Templates differ in what they make
of this; which kind one is shows in what it renders, no template is known by name:

* it marks what the assistant says (``{% generation %}``): the marks are taken as they are;
* it renders a turn the same whatever follows: a conversation is one example, its turns are found by their prefixes;
* it renders earlier turns differently once more follow (thoughts are left out, another end of turn): turns whose
  prompts do not continue one another are examples of their own;
* its generation prompt opens a thought that the finished turn leaves out: the thought and its end are put back.

Every turn ends with the token that stops generation: the end of turn that the template writes, or else the marker of
the role that follows, or else the end of the sequence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raymem.errors import DataError, ModelError
from raymem.training.data.formats import Messages
from raymem.training.data.thoughts import REASONING, follow, is_doubled, reasoning_of, split_off
from raymem.training.data.turns import roles_of

Turn = dict[str, Any]
Piece = tuple[str, bool]
"""A text, and whether its tokens are to be predicted."""
UNSTOPPED = (
    "the chat template writes no token behind {count} of {turns} assistant turns that could stop generation, so the model "
    "does not learn to stop there: use a template with a token at the end of a turn"
)
UNSAID = (
    "{count} of {turns} assistant turns bring reasoning that the chat template does not write there, so it is not "
    "trained: use a template that does"
)

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_FEW = 4
"""Up to so many turns, rendering each with all that precedes it costs no more than looking for a shorter way."""


@dataclass(frozen=True)
class _Rendered:
    """An assistant turn in text."""

    prompt: str
    """What the model is given."""
    said: str
    """What it is to say behind it, up to the token that stops it if there is one."""
    stopped: bool
    """Whether ``said`` ends with a token that stops generation."""


class Chat:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers with an end-of-sequence token.
        name: what to call it in errors.
        turns: whether all of the assistant's turns are targets, or the last one of each conversation.
    """

    def __init__(self, tokenizer: Any, name: str, turns: Literal["all", "last"] = "all") -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._only_last = turns == "last"
        template = tokenizer.chat_template
        # Some tokenizers have several, by name.
        self._template = "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template or "")
        added = tokenizer.added_tokens_decoder
        self._added = _longest_first(str(token) for token in added.values())
        self._special = tuple(sorted(str(token) for token in added.values() if token.special))
        ids = [tokenizer.eos_token_id, *getattr(tokenizer, "stop_ids", ())]
        self._stops = {str(token) for token in tokenizer.convert_ids_to_tokens(ids)}
        self._user_marker: str | None = None
        self._is_probed = False
        self.noted: Counter[str] = Counter()
        """How often something happened that is worth a warning: :data:`UNSTOPPED`, :data:`UNSAID`."""
        self.num_turns = 0
        """Assistant turns that became targets."""

    def speaks_of(self, key: str) -> bool:
        """Whether the template speaks of a key of a message, or of ``tools``."""
        # transformers gives a template what stands under one of the keys for reasoning under the others as well.
        keys = REASONING if key in REASONING else (key,)
        return any(re.search(rf"(?<!\w){re.escape(each)}(?!\w)", self._template) for each in keys)

    def pieces(self, example: Messages, place: str) -> list[list[Piece]]:
        """The examples that a conversation gives, each in pieces of text; at least one, perhaps without a target.

        Raises:
            DataError: the template does not render this conversation; begins with ``place``.
            ModelError: the tokenizer has no chat template, or one that cannot be read.
        """
        if self._tokenizer.chat_template is None:
            raise ModelError(
                f"{place} is a conversation, but tokenizer {self._name} has no chat template: set model.tokenizer to "
                f"one that has (for example that of the model's instruct version), or use format prompt_completion."
            )
        self._probe()
        messages, tools = self._with_contents(example, place), example.tools
        learned = self._learned(example, messages)
        self.num_turns += len(learned)
        if _MARKS.search(self._template):
            text, spans = self._marked(messages, tools, place)
            if spans:
                return [self._at_marks(text, self._without_silent(spans, messages, learned, tools, place), place)]
        if not learned:
            (text,) = self._render([messages], tools, place)
            return [[(_not_empty(text, self._name, place), False)]]
        full, turns = self._turns(messages, learned, tools, place)
        return self._joined(messages, full, turns)

    def _learned(self, example: Messages, messages: Sequence[Turn]) -> list[int]:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        answers = answers[-1:] if self._only_last else answers
        return [i for i in answers if i not in example.silent and not self._is_lost(example.messages[i])]

    def _is_lost(self, message: Turn) -> bool:
        """Whether a turn consists of calls only and the template does not write them, so that it would be empty."""
        calls = [key for key in ("tool_calls", "function_call") if message.get(key)]
        return bool(calls) and not message["content"] and not any(map(self.speaks_of, calls))

    # Finding the turns

    def _turns(
        self, messages: list[Turn], learned: list[int], tools: Any, place: str
    ) -> tuple[str, dict[int, _Rendered]]:
        """The whole conversation, and its learned turns."""
        (full,) = self._render([messages], tools, place)
        _not_empty(full, self._name, place)
        ends = self._ends_by_exchange(messages, learned, tools, full) if len(learned) > _FEW else None
        if ends is not None:
            return full, {i: _Rendered(full[:at], full[at:end], stopped) for i, (at, end, stopped) in ends.items()}
        earlier = [messages[: i + 1] for i in learned if i + 1 < len(messages)]
        finished = [*self._render(earlier, tools, place), full]  # the last of them is used if the last turn is learned
        prompts = self._render([messages[:i] for i in learned], tools, place, add_generation_prompt=True)
        turns: dict[int, _Rendered] = {}
        for index, prompt, turn in zip(learned, prompts, finished, strict=False):
            said = self._said(messages, index, prompt, turn, tools, place)
            end = self._end_of(said)
            turns[index] = _Rendered(prompt, said[:end], end is not None)
        return full, turns

    def _said(self, messages: list[Turn], index: int, prompt: str, turn: str, tools: Any, place: str) -> str:
        """What stands behind the prompt of a turn that is rendered as ``turn``."""
        message = messages[index]
        if is_doubled(prompt, turn, message):
            message = split_off(prompt, message)
            (turn,) = self._render([[*messages[:index], message]], tools, place)
        said = follow(prompt, turn, message, self._template)
        if said is None:
            written = prompt[-40:]
            raise DataError(
                f"{place} messages[{index}]: the generation prompt of tokenizer {self._name}'s chat template ends with "
                f"{written!r}, which the template does not write once the turn is there, so what follows it cannot be "
                f"told: use a tokenizer whose template begins a turn as it prompts for one."
            )
        content = message["content"]
        if not said.strip() and isinstance(content, str) and content.strip():
            raise DataError(
                f"{place} messages[{index}]: the chat template of tokenizer {self._name} does not write what this turn "
                f"says ({content[:40]!r}): set model.tokenizer to one whose template does."
            )
        reasoning = reasoning_of(message)
        if reasoning.strip() and reasoning.strip() not in said and self.speaks_of("reasoning_content"):
            self.noted[UNSAID] += 1
        return said

    def _ends_by_exchange(
        self, messages: list[Turn], learned: list[int], tools: Any, full: str
    ) -> dict[int, tuple[int, int, bool]] | None:
        """Where each learned turn begins and ends in ``full``, in a time linear in the turns; None where that fails.

        An exchange is a user's turns and all that follows up to the next user's turn. Each is rendered behind the first
        one alone. If ``full`` is these renderings one after the other, and the last turn has also in full the prompt
        and the end that were found so, every turn is rendered the same whatever stands around it.
        """
        roles = [message["role"] for message in messages]
        begins = [i for i in range(1, len(roles)) if roles[i] == "user" and roles[i - 1] not in ("user", "system")]
        if len(begins) < 2 or "assistant" not in roles[: begins[0]]:
            return None
        first = messages[: begins[0]]
        exchanges = [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(messages)], strict=True)]
        inside = [(exchange, i) for exchange in exchanges for i in exchange if i in set(learned)]
        own = [i for i in learned if i < begins[0]]
        last = learned[-1]
        prompted = [*(messages[:i] for i in (*own, last)), *([*first, *messages[e.start : i]] for e, i in inside)]
        finished = [*(messages[: i + 1] for i in (*own, last)), *([*first, *messages[e.start : i + 1]] for e, i in inside)]
        try:
            start, *wholes = self._apply([first, *([*first, *messages[e.start : e.stop]] for e in exchanges)], tools)
            prompts = self._apply(prompted, tools, add_generation_prompt=True)
            turns = self._apply(finished, tools)
        except Exception:  # the template refuses an excerpt; what it says of the whole is said there
            return None
        start = self._cut(start)
        at = len(start)
        begins_at: dict[int, int] = {}
        for exchange, whole in zip(exchanges, map(self._cut, wholes), strict=True):
            if not (whole.startswith(start) and full.startswith(whole[len(start) :], at)):
                return None
            begins_at[exchange.start] = at
            at += len(whole) - len(start)
        if not full.startswith(start):
            return None
        ends: dict[int, tuple[int, int, bool]] = {}
        checked: list[tuple[int, int, bool]] = []
        before = [(i, 0, 0) for i in (*own, last)] + [(i, begins_at[e.start], len(start)) for e, i in inside]
        for (index, offset, skipped), prompt, turn in zip(before, prompts, turns, strict=True):
            if not (turn.startswith(prompt) and prompt.startswith(start[:skipped])):
                return None
            if is_doubled(prompt, turn, messages[index]):
                return None
            end = self._end_of(turn[len(prompt) :])
            said = turn[len(prompt) :][:end]
            if not (full.startswith(prompt[skipped:], offset) and said.strip()):
                return None
            begin = offset + len(prompt) - skipped
            if not full.startswith(said, begin):
                return None
            found = (begin, begin + len(said), end is not None)
            if skipped == 0 and index == last and last not in own:
                checked.append(found)
            else:
                ends[index] = found
        return ends if all(ends[last] == exact for exact in checked) else None

    # Putting them together

    def _joined(self, messages: list[Turn], full: str, turns: dict[int, _Rendered]) -> list[list[Piece]]:
        """Examples of turns that continue one another."""
        examples: list[list[Piece]] = []
        text, pieces, open_turn = "", [], False  # the example that is being written; its last turn lacks its stop
        for index, turn in turns.items():
            if pieces and turn.prompt.startswith(text):
                header = turn.prompt[len(text) :]
                if open_turn:
                    header = self._stop_with(pieces, header)
                pieces += [(header, False), (turn.said, True)]
            else:
                if pieces:
                    self._close(pieces, text, full, open_turn)
                    examples.append(pieces)
                pieces = [(turn.prompt, False), (turn.said, True)]
            text, open_turn = turn.prompt + turn.said, not turn.stopped
        if full.startswith(text):
            rest = full[len(text) :]
            if open_turn and index + 1 < len(messages):
                rest = self._stop_with(pieces, rest)
            elif open_turn:
                pieces, rest = [*pieces, (rest + self._tokenizer.eos_token, True)], ""
            pieces.append((rest, False))
        elif open_turn:
            self._close(pieces, text, full, open_turn, is_last=index + 1 == len(messages))
        examples.append(pieces)
        return [_merged(pieces) for pieces in examples]

    def _close(self, pieces: list[Piece], text: str, full: str, open_turn: bool, *, is_last: bool = False) -> None:
        """End an example whose continuation is no example of it."""
        if not open_turn:
            return
        if full.startswith(text):
            self._stop_with(pieces, full[len(text) :])
        elif is_last or self._user_marker is not None:
            pieces.append((self._tokenizer.eos_token if is_last else self._user_marker, True))
        else:
            self.noted[UNSTOPPED] += 1

    def _stop_with(self, pieces: list[Piece], following: str) -> str:
        """Add the marker that ``following`` begins with as a target; returns what is left of it."""
        marker = self._leading_token(following)
        if not marker:
            self.noted[UNSTOPPED] += 1
            return following
        pieces.append((marker, True))
        return following[len(marker) :]

    def _leading_token(self, text: str) -> str:
        """White space and the added token that a text begins with; "" where it begins with something else."""
        start = len(text) - len(text.lstrip())
        token = next((token for token in self._added if text.startswith(token, start)), "")
        return text[:start] + token if token else ""

    def _cut(self, text: str) -> str:
        return text[: self._end_of(text)]

    def _end_of(self, text: str) -> int | None:
        """Where the token that stops generation ends, if ``text`` ends with one and perhaps more that closes a turn."""
        at = len(text)
        others: int | None = None
        first: int | None = None
        while True:
            at = len(text[:at].rstrip())
            stop = next((stop for stop in self._stops if text.endswith(stop, 0, at)), None)
            token = stop or next((token for token in self._special if text.endswith(token, 0, at)), None)
            if not token:
                return others if first is None else first
            first = at if stop else first
            others = at if others is None else others
            at -= len(token)

    def _probe(self) -> None:
        """Learn from a small conversation what the template writes behind an assistant's turn."""
        if self._is_probed:
            return
        self._is_probed = True
        question, answer = {"role": "user", "content": "aqqa"}, {"role": "assistant", "content": "awwa"}
        for talk in ([question, answer], [question, answer, question]):
            try:
                (text,) = self._apply([talk], None)
            except Exception:  # what the template demands will be said of the data
                continue
            _, _, behind = text.rpartition("awwa")
            token = self._leading_token(behind).strip()
            if token and token in self._stops | {*self._special} | {*self._added}:
                if len(talk) == 2:
                    self._stops.add(token)
                else:
                    self._user_marker = token

    # The template's own marks

    def _marked(self, messages: list[Turn], tools: Any, place: str) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        def render() -> Any:
            return render_jinja_template(
                conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
                tools=tools,
                chat_template=self._tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )

        try:
            (text,), (spans,) = render()
        except Exception as error:
            raise self._refusal(error, messages, place) from error
        return _not_empty(text, self._name, place), [(begin, end) for begin, end in spans if end > begin]

    def _without_silent(
        self, spans: list[tuple[int, int]], messages: list[Turn], learned: list[int], tools: Any, place: str
    ) -> list[tuple[int, int]]:
        """The marks without those of turns that are not learned: a turn has those that come with it."""
        left_out: set[int] = set()
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index not in learned:
                before, after = (
                    len(self._marked(messages[:end], tools, place)[1]) if end else 0 for end in (index, index + 1)
                )
                left_out |= {*range(before, after)}
        return [span for number, span in enumerate(spans) if number not in left_out]

    def _at_marks(self, text: str, spans: list[tuple[int, int]], place: str) -> list[Piece]:
        pieces: list[Piece] = []
        at = 0
        for begin, end in spans:
            pieces += [(text[at:begin], False), (text[begin:end], True)]
            at = end
            if self._end_of(text[begin:end]) is None:
                marker = self._leading_token(text[end:])
                if marker.strip() in {*self._stops, self._user_marker}:
                    pieces.append((marker, True))
                    at += len(marker)
                elif not text[end:].strip():
                    pieces.append((text[end:] + self._tokenizer.eos_token, True))
                    at = len(text)
                elif (begin, end) == spans[-1]:
                    self.noted[UNSTOPPED] += 1
        return _merged([*pieces, (text[at:], False)])

    # Rendering

    def _with_contents(self, example: Messages, place: str) -> list[Turn]:
        """The messages; a content that is None becomes "" where the template would fail or write None into the text."""
        messages = example.messages
        if all(message["content"] is not None for message in messages):
            return messages
        filled = [m if m["content"] is not None else m | {"content": ""} for m in messages]
        (rendered,) = self._render([filled], example.tools, place)
        try:
            (as_they_are,) = self._apply([messages], example.tools)
        except Exception:
            return filled
        return filled if as_they_are.count("None") > rendered.count("None") else messages

    def _render(self, talks: list[list[Turn]], tools: Any, place: str, *, add_generation_prompt: bool = False) -> list[str]:
        try:
            return self._apply(talks, tools, add_generation_prompt=add_generation_prompt)
        except Exception:  # templates raise whatever their expressions run into
            for talk in talks:
                try:
                    self._apply([talk], tools, add_generation_prompt=add_generation_prompt)
                except Exception as error:
                    raise self._refusal(error, talk, place) from error
            raise

    def _apply(self, talks: list[list[Turn]], tools: Any, *, add_generation_prompt: bool = False) -> list[str]:
        if not talks:
            return []
        return list(
            self._tokenizer.apply_chat_template(
                talks, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _refusal(self, error: Exception, talk: list[Turn], place: str) -> DataError | ModelError:
        import jinja2

        words = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, jinja2.TemplateSyntaxError):
            return ModelError(
                f"the chat template of tokenizer {self._name} is no valid template (line {error.lineno}: {words}): mend "
                f"its chat_template.jinja, or set model.tokenizer to another one."
            )
        roles = roles_of(talk)
        if not talk:
            return DataError(
                f"{place}: the conversation begins with a turn of the assistant, for which the chat template of "
                f"tokenizer {self._name} writes no prompt ({words}): put a user's turn before it, or mark it with "
                f"weight: 0."
            )
        if type(error) is jinja2.TemplateError:  # raised by the template, in its author's words
            return DataError(
                f"{place}: the chat template of tokenizer {self._name} refuses the turns {roles} ({words}): reorder "
                f"or leave out turns as it demands."
            )
        return DataError(
            f"{place}: the chat template of tokenizer {self._name} fails on the turns {roles} ({type(error).__name__}: "
            f"{words}): give the turns what it reads, or set model.tokenizer to one with another template."
        )


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces without empty ones, neighbours of one kind joined."""
    merged: list[Piece] = []
    for text, is_target in pieces:
        if not text:
            continue
        if merged and merged[-1][1] == is_target:
            merged[-1] = (merged[-1][0] + text, is_target)
        else:
            merged.append((text, is_target))
    return merged


def _not_empty(text: str, name: str, place: str) -> str:
    if not text.strip():
        raise DataError(
            f"{place}: the chat template of tokenizer {name} renders nothing for this conversation: set model.tokenizer "
            f"to one whose chat template writes the turns, or use format prompt_completion."
        )
    return text


def _longest_first(tokens: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({token for token in tokens if token.strip()}, key=lambda token: (-len(token), token)))

"""Conversations -> pieces of text, each a target or not, as inference will see every turn.

For an assistant turn, the *prompt* is the template's rendering of the turns before it with the generation prompt, and
what the model is to say is what the template writes behind it once the turn is there. Templates differ in what they
make of this; which kind one is shows in what it renders, no template is known by name:

* it marks what the assistant says (``{% generation %}``): the marks are taken as they are;
* it renders a turn the same whatever follows: a conversation is one example, its turns are found by their prompts;
* it renders earlier turns differently once more follow (thoughts are left out, another end of turn): turns whose
  prompts do not continue one another are examples of their own;
* its generation prompt opens a thought that the finished turn leaves out: the thought and its end are put back.

Every turn ends with the token that stops generation: the end of turn that the template writes, or else the marker of
the role that follows, or else the end of the sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raymem.errors import DataError, ModelError
from raymem.training.data.chat.template import Span, Template, Turn
from raymem.training.data.chat.thoughts import follow, is_doubled, reasoning_of, split_off, written_thought
from raymem.training.data.formats import Messages
from raymem.training.data.turns import miswritten_arguments

Piece = tuple[str, bool]
"""A text, and whether its tokens are to be predicted."""
UNSTOPPED = (
    "behind {count} of {turns} assistant turns the chat template writes no token that could stop generation, so the "
    "model does not learn to stop there: use a template with a token at the end of a turn"
)
UNSAID = (
    "{count} of {turns} assistant turns bring reasoning that the chat template does not write there, so it is not "
    "trained: use a template that does"
)
EMPTY = "{count} turns of the assistant say nothing, so they are not trained; {turns} are"
MISWRITTEN = {
    "text": (
        "in {count} conversations the chat template writes the arguments of calls, which are JSON text, as an escaped "
        "string: give them as objects"
    ),
    "object": (
        "in {count} conversations the chat template writes the arguments of calls, which are objects, as Python and "
        "not as JSON: give them as JSON text"
    ),
}

_FEW = 4
"""Up to so many turns, rendering each with all that precedes it costs no more than looking for a shorter way."""


@dataclass(frozen=True)
class _Said:
    """An assistant turn in text."""

    prompt: str
    text: str
    """The targets behind the prompt, up to the token that stops generation if there is one."""
    stops: bool
    """Whether ``text`` ends with a token that stops generation."""


class Chat:
    """Conversations in one chat template.

    Args:
        template: the template.
        turns: whether all of the assistant's turns are targets, or the last one of each conversation.
    """

    def __init__(self, template: Template, turns: Literal["all", "last"] = "all") -> None:
        self._template = template
        self._only_last = turns == "last"
        self.noted: Counter[str] = Counter()
        """How often something happened that is worth a warning: such as :data:`UNSTOPPED`."""
        self.num_turns = 0
        """Assistant turns that became targets."""

    def pieces(self, example: Messages, where: str) -> list[list[Piece]]:
        """Return the examples that a conversation gives, each in pieces of text; at least one, perhaps without a
        target.

        Raises:
            DataError: the template does not render this conversation; begins with ``where``.
            ModelError: the tokenizer has no chat template, or one that cannot be read.
        """
        template, tools = self._template, example.tools
        if not template.exists:
            raise ModelError(
                f"{where} is a conversation, but tokenizer {template.name} has no chat template: set model.tokenizer "
                f"to one that has (for example that of the model's instruct version), or use format prompt_completion."
            )
        messages = template.readable(example, where)
        learned = self._learned(example, messages)
        self.num_turns += len(learned)
        if template.has_marks:
            text, spans = template.marked(messages, tools, where)
            if spans:
                self._note_arguments(messages, text)
                spans = self._of_learned(spans, messages, learned, tools, where)
                marked = "".join(text[begin:end] for begin, end in spans)
                if lacking := sum(self._lacks_reasoning(messages[i], marked) for i in learned):
                    self.noted[UNSAID] += lacking
                return [self._between(text, spans)]
        full = template.whole(messages, tools, where)
        self._note_arguments(messages, full)
        turns = self._turns(messages, learned, full, tools, where)
        return self._joined(turns, full, lambda end: self._template.whole(messages[:end], tools, where), len(messages))

    def _learned(self, example: Messages, messages: Sequence[Turn]) -> list[int]:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        answers = answers[-1:] if self._only_last else answers
        answers = [index for index in answers if index not in example.silent]
        learned = [index for index in answers if not self._is_lost(example.messages[index])]
        if lost := len(answers) - len(learned):
            self.noted[EMPTY] += lost
        return learned

    def _note_arguments(self, messages: Sequence[Turn], text: str) -> None:
        if (form := miswritten_arguments(messages, text)) is not None:
            self.noted[MISWRITTEN[form]] += 1

    def _is_lost(self, message: Turn) -> bool:
        """Say whether a turn says nothing: an answer that got lost, or calls alone that the template does not write."""
        calls = [key for key in ("tool_calls", "function_call") if message.get(key)]
        return not (message["content"] or reasoning_of(message) or any(map(self._template.reads, calls)))

    # Finding the turns by their prompts

    def _turns(self, messages: list[Turn], learned: list[int], full: str, tools: Any, where: str) -> dict[int, _Said]:
        """Return the learned turns; ``full`` is the whole conversation in text."""
        if len(learned) > _FEW and (turns := self._turns_by_exchange(messages, learned, full, tools)) is not None:
            return turns
        render = self._template.render
        finished = render([messages[: i + 1] for i in learned if i + 1 < len(messages)], tools, where)
        prompts = render([messages[:i] for i in learned], tools, where, add_generation_prompt=True)
        turns = {}
        for index, prompt, turn in zip(learned, prompts, [*finished, full], strict=False):
            text = self._said(messages, index, prompt, turn, tools, where)
            turns[index] = self._up_to_its_stop(prompt, text)
        return turns

    def _up_to_its_stop(self, prompt: str, text: str) -> _Said:
        end = self._template.end_of(text)
        return _Said(prompt, text[:end], end is not None)

    def _said(self, messages: list[Turn], index: int, prompt: str, turn: str, tools: Any, where: str) -> str:
        """Return the text behind the prompt of a turn that is rendered as ``turn``."""
        message = messages[index]
        if is_doubled(prompt, turn, message):
            message = split_off(prompt, message)
            (turn,) = self._template.render([[*messages[:index], message]], tools, where)
        text = follow(prompt, turn, message, self._template.source)
        subject = f"{where} messages[{index}]: the chat template of tokenizer {self._template.name}"
        if text is None and not index:
            raise DataError(
                f"{subject} prompts for a turn at the very beginning with {prompt[-40:]!r}, which the finished "
                f"conversation does not begin with: put a user's turn before it, or mark it with weight: 0."
            )
        if text is None:
            text = self._behind_header(messages[:index], prompt, turn, message, tools, where)
        if text is None:
            raise DataError(
                f"{subject} ends its generation prompt with {prompt[-40:]!r}, which it does not write once the turn is "
                f"there, so what is to follow it cannot be told: use a tokenizer whose template begins a turn as it "
                f"prompts for one."
            )
        content = message["content"]
        if not text.strip() and isinstance(content, str) and content.strip():
            raise DataError(
                f"{subject} does not write what this turn says ({content[:40]!r}): set model.tokenizer to one whose "
                f"template does."
            )
        if self._lacks_reasoning(message, text):
            self.noted[UNSAID] += 1
        return text

    def _behind_header(
        self, before: list[Turn], prompt: str, turn: str, message: Turn, tools: Any, where: str
    ) -> str | None:
        """Return the text behind what the generation prompt adds, where ``before`` is written otherwise once more
        follows.
        """
        (text,) = self._template.render([before], tools, where)
        text = self._template.cut(text)
        header = prompt[len(text) :] if prompt.startswith(text) else ""
        begin = self._template.leading_token(header)
        if not begin or turn.count(begin) != prompt.count(begin):
            return None
        return follow(header, turn[turn.rindex(begin) :], message, self._template.source)

    def _lacks_reasoning(self, message: Turn, text: str) -> bool:
        # Keys that the template does not even speak of are named in the warning about what is not read.
        in_key = reasoning_of(message).strip() if self._template.reads("reasoning") else ""
        return in_key not in text or written_thought(message) not in text

    def _turns_by_exchange(
        self, messages: list[Turn], learned: list[int], full: str, tools: Any
    ) -> dict[int, _Said] | None:
        """Return the learned turns in a time linear in their number; None where that fails.

        An exchange is a user's turns and all that follows up to the next user's turn. Each is rendered behind the first
        one alone. If ``full`` is these renderings one after the other, and the last turn has also in full the prompt
        and the text that were found so, every turn is rendered the same whatever stands around it.
        """
        roles = [message["role"] for message in messages]
        begins = [i for i in range(1, len(roles)) if roles[i] == "user" and roles[i - 1] not in ("user", "system")]
        if not begins or "assistant" not in roles[: begins[0]]:
            return None
        first, last = messages[: begins[0]], learned[-1]
        apply, cut = self._template.apply, self._template.cut
        # Excerpts, named by the index behind their last turn: up to every learned turn, and to the end of an exchange.
        excerpts: dict[int, list[Turn]] = {}
        for begin, stop in zip(begins, [*begins[1:], len(messages)], strict=True):
            for end in [*(i + 1 for i in learned if begin <= i < stop), stop]:
                excerpts[end] = [*first, *messages[begin:end]]
        alone = [i for i in learned if i < begins[0]]
        prompted = {i: excerpts[i + 1][:-1] if i >= begins[0] else messages[:i] for i in learned}
        try:
            texts = dict(zip(excerpts, apply(list(excerpts.values()), tools), strict=True))
            start, *finished = apply([first, *(messages[: i + 1] for i in (*alone, last))], tools)
            *prompts, exact = apply([*prompted.values(), messages[:last]], tools, add_generation_prompt=True)
        except Exception:  # the template refuses an excerpt; what it says of the whole is said where that is rendered
            return None
        start = cut(start)
        if not full.startswith(start):
            return None
        offsets = [len(start)]  # of every exchange in full
        for stop in [*begins[1:], len(messages)]:
            text = cut(texts[stop])
            if not (text.startswith(start) and full.startswith(text[len(start) :], offsets[-1])):
                return None
            offsets.append(offsets[-1] + len(text) - len(start))
        turns: dict[int, _Said] = {}
        exchange = -1
        for number, (index, prompt) in enumerate(zip(learned, prompts, strict=True)):
            while exchange + 1 < len(begins) and index >= begins[exchange + 1]:
                exchange += 1
            is_first = exchange < 0
            turn = finished[number] if is_first else texts[index + 1]
            offset, skipped = (0, 0) if is_first else (offsets[exchange], len(start))
            if not (turn.startswith(prompt) and prompt.startswith(start[:skipped])):
                return None
            if is_doubled(prompt, turn, messages[index]):
                return None
            said = self._up_to_its_stop(prompt, turn[len(prompt) :])
            at = offset + len(prompt) - skipped
            if not (said.text.strip() and full.startswith(prompt[skipped:] + said.text, offset)):
                return None
            if self._lacks_reasoning(messages[index], said.text):
                return None
            turns[index] = _Said(full[:at], said.text, said.stops)
        checked = self._up_to_its_stop(exact, finished[-1][len(exact) :]) if finished[-1].startswith(exact) else None
        return turns if turns[last] == checked else None

    # Putting them together

    def _joined(
        self, turns: dict[int, _Said], full: str, begin: Callable[[int], str], length: int
    ) -> list[list[Piece]]:
        """Return examples of turns that continue one another.

        Args:
            full: the whole conversation of ``length`` turns.
            begin: renders so many turns of it.
        """
        examples: list[list[Piece]] = [[]]
        text, stops, last = "", True, -1  # of the last example; whether its last turn, which is turn ``last``, stops
        for index, turn in turns.items():
            if turn.prompt.startswith(text):
                header = turn.prompt[len(text) :]
                header = header if stops else self._stop_with(examples[-1], header)
            else:
                if not stops:
                    self._stop_with(examples[-1], self._following(text, full, begin, last))
                examples.append([])
                header = turn.prompt
            examples[-1] += [(header, False), (turn.text, True)]
            text, stops, last = turn.prompt + turn.text, turn.stops, index
        rest = full[len(text) :] if full.startswith(text) else ""
        if not stops and last + 1 == length:
            examples[-1].append((self._template.end_of_sequence, True))
        elif not stops:
            left = self._stop_with(examples[-1], self._following(text, full, begin, last))
            rest = left if rest else ""
        examples[-1].append((rest, False))
        return [_merged(pieces) for pieces in examples]

    def _following(self, text: str, full: str, begin: Callable[[int], str], last: int) -> str:
        """Return the text that follows ``text``, which ends with turn ``last``; at least its first token."""
        whole = full if full.startswith(text) else begin(last + 2)
        return whole[len(text) :] if whole.startswith(text) else self._template.user_marker or ""

    def _stop_with(self, pieces: list[Piece], following: str) -> str:
        """Add the token that ``following`` begins with as a target; returns what is left of it."""
        marker = self._template.leading_token(following)
        if not marker:
            self.noted[UNSTOPPED] += 1
        pieces.append((marker, True))
        return following[len(marker) :]

    # The template's own marks

    def _of_learned(
        self, spans: list[Span], messages: list[Turn], learned: list[int], tools: Any, where: str
    ) -> list[Span]:
        """Return the marks without those of turns that are not learned: a turn has those that come with it."""
        left_out: set[int] = set()
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index not in learned:
                before, after = (
                    len(self._template.marked(messages[:end], tools, where)[1]) if end else 0
                    for end in (index, index + 1)
                )
                left_out |= {*range(before, after)}
        return [span for number, span in enumerate(spans) if number not in left_out]

    def _between(self, text: str, spans: list[Span]) -> list[Piece]:
        """Return the text in pieces; where a mark ends before the token that stops generation, that is a target too."""
        template = self._template
        pieces: list[Piece] = []
        at = 0
        for begin, end in spans:
            pieces += [(text[at:begin], False), (text[begin:end], True)]
            at = end
            if template.end_of(text[begin:end]) is None:
                marker = template.leading_token(text[end:])
                if marker.strip() in {*template.stops, template.user_marker}:
                    pieces.append((marker, True))
                    at += len(marker)
                elif not text[end:].strip():
                    pieces.append((text[end:] + template.end_of_sequence, True))
                    at = len(text)
                elif (begin, end) == spans[-1]:
                    self.noted[UNSTOPPED] += 1
        return _merged([*pieces, (text[at:], False)])


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Return pieces without empty ones, neighbours of one kind joined."""
    merged: list[Piece] = []
    for text, is_target in pieces:
        if text and merged and merged[-1][1] == is_target:
            merged[-1] = (merged[-1][0] + text, is_target)
        elif text:
            merged.append((text, is_target))
    return merged

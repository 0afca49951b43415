"""Rows of any accepted layout -> one of four kinds of example."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from raymem.errors import DataError
from raymem.recipe.data import Source
from raymem.text import cut, shown
from raymem.training.data.guess import guess
from raymem.training.data.rows.tables import Row
from raymem.training.data.tokens import Tokens, tokens
from raymem.training.data.turns import described, history, is_learned, message, schemas, sharegpt, text_of

Format = Literal["text", "prompt_completion", "messages", "alpaca", "sharegpt", "tokens"]

# In the order in which ``auto`` looks: the most structured first, because such rows often have a rendered text too.
COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "tokens": ("input_ids",),
}
_BESIDE_TURNS = ("system", "tools")
_OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": _BESIDE_TURNS,
    "sharegpt": _BESIDE_TURNS,
    "prompt_completion": _BESIDE_TURNS,  # where prompt and completion become turns
    "alpaca": ("input", "history", *_BESIDE_TURNS),
    "text": (),
    "tokens": ("labels", "attention_mask"),
}


@dataclass(frozen=True)
class Text:
    """Plain text; every token is to be predicted."""

    text: str


@dataclass(frozen=True)
class PromptCompletion:
    """A completion to be predicted after a prompt; nothing is put between the two."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Messages:
    """A conversation; the assistant's turns are to be predicted.

    ``messages`` are dicts with ``role`` (str) and ``content`` (str, or None beside tool calls); other keys are handed
    to the chat template.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    """Schemas of what the assistant may call, for the chat template."""
    silent: frozenset[int] = frozenset()
    """Turns that are not to be predicted although they are the assistant's."""


Example = Text | PromptCompletion | Messages | Tokens
Turn = tuple[dict[str, Any], bool]
"""A message, and whether it may be learned."""


def resolve_format(source: Source, first_row: Row, where: str) -> Format:
    """Return the format of a source: as the recipe says, or, for ``auto``, by the columns of its first row.

    Raises:
        DataError: ``columns`` names a column that does not exist, or the columns fit no format.
    """
    known = dict.fromkeys(
        name for groups in (COLUMNS.values(), _OPTIONAL.values()) for names in groups for name in names
    )
    for ours, theirs in source.columns.items():
        if ours not in known:
            raise DataError(f"{where}.columns: {shown(ours)} is no column of ours, the names are {', '.join(known)}.")
        if theirs not in first_row:
            near = difflib.get_close_matches(theirs, list(first_row), n=1, cutoff=0.0)
            hint = f"; did you mean {shown(near[0])}?" if near else "."
            raise DataError(
                f"{where}.columns.{ours}={shown(theirs)} is none of the data's columns {_names(first_row)}{hint}"
            )
    if source.format != "auto":
        return source.format
    row = in_our_names(first_row, source.columns)
    for name, required in COLUMNS.items():
        if all(column in row for column in required):
            return name
    likely = guess(row)
    columns = ", ".join(f"{ours}: {cut(theirs, 60)}" for ours, theirs in (likely[1] if likely else {}).items())
    hint = f" (perhaps {where}.columns={{{columns}}})" if columns else ""
    accepted = "; ".join(f"{' + '.join(required)} ({name})" for name, required in COLUMNS.items())
    raise DataError(
        f"{where}.format=auto finds columns {_names(row)}, which fit no format: rename them with {where}.columns to "
        f"one of: {accepted}{hint}."
    )


def _always(prompt: str) -> bool:
    return True


def to_example(
    row: Row,
    row_format: Format,
    columns: dict[str, str],
    where: str,
    *,
    calls: bool = True,
    renders: Callable[[str], bool] = _always,
) -> Example:
    """Return one row as an example.

    Args:
        calls: the chat template reads ``tool_calls``; otherwise a function call stays as it is written.
        renders: says of a prompt in text whether the chat template is to render it and its answer as turns.

    Raises:
        DataError: a column is missing, or a value is not of the expected type; begins with ``where``.
    """
    row = in_our_names(row, columns)
    if row_format == "text":
        return Text(_text(row, "text", where))
    if row_format == "tokens":
        return tokens(row, where)
    if row_format == "prompt_completion":
        if not has_turns(row):
            prompt, answer = _text(row, "prompt", where), _answer(row, "completion", where) or ""
            if not answer or not renders(prompt):
                return PromptCompletion(prompt, answer)
            turns = [({"role": "user", "content": prompt}, True), ({"role": "assistant", "content": answer}, True)]
            return _conversation(row, turns, where)
        before, after = (
            _side(row, column, role, where, calls) for column, role in (("prompt", "user"), ("completion", "assistant"))
        )
        if not before + after:
            return PromptCompletion("", "")
        turns = [*((turn, False) for turn, _ in before), *after]
    elif row_format == "alpaca":
        turns = _alpaca(row, where)
        if not renders(turns[-2][0]["content"]):
            return _in_paragraphs(_conversation(row, turns, where))
    elif row_format == "messages":
        turns = _read_turns(row, "messages", where, calls)
    else:
        turns = [
            (sharegpt(turn, f"{where} conversations[{i}]", calls=calls), is_learned(turn))
            for i, turn in enumerate(_turns(row, "conversations", where))
        ]
    return _conversation(row, turns, where)


def without_targets(example: Example) -> str:
    """Say why nothing of an example is to be predicted, in words for a count of such examples."""
    if isinstance(example, Tokens):
        return "every label is -100"
    if not isinstance(example, Messages):
        name = "completion" if isinstance(example, PromptCompletion) else "text"
        is_empty = not (example.completion if isinstance(example, PromptCompletion) else example.text)
        return f"the {name} is empty" if is_empty else f"the tokenizer makes no token of the {name}"
    roles = dict.fromkeys(message["role"] for message in example.messages)
    if "assistant" not in roles:
        return f"no turn has the role assistant, only {', '.join(roles)}"
    return "the assistant's turns are empty or marked not to be learned"


def columns_read(row_format: Format, *, as_turns: bool) -> tuple[str, ...]:
    """Return names of the columns that :func:`to_example` reads of a row in our names, were they there.

    Args:
        as_turns: the row became a conversation.
    """
    optional = _OPTIONAL[row_format] if row_format != "prompt_completion" or as_turns else ()
    left_out = ("tools",) if row_format == "alpaca" and not as_turns else ()
    return tuple(column for column in (*COLUMNS[row_format], *optional) if column not in left_out)


def has_turns(row: Row) -> bool:
    """Say whether prompt or completion of a row in our names is a list of turns."""
    return isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list)


def in_our_names(row: Row, columns: dict[str, str]) -> Row:
    """Return the row with the columns that the recipe renames under our names, and no longer under theirs."""
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _alpaca(row: Row, where: str) -> list[Turn]:
    instruction, answer = _text(row, "instruction", where), _answer(row, "output", where)
    extra = _text(row, "input", where) if row.get("input") is not None else ""
    question = f"{instruction}\n\n{extra}" if extra else instruction
    turns: list[Turn] = [(turn, True) for turn in history(row.get("history"), where)]
    turns.append(({"role": "user", "content": question}, True))
    return [*turns, ({"role": "assistant", "content": answer or ""}, answer is not None)]


def _in_paragraphs(talk: Messages) -> PromptCompletion:
    """Return a conversation without a template: what was said with empty lines between, the last answer to be
    predicted.
    """
    *before, answer = (message["content"] for message in talk.messages)
    return PromptCompletion("".join(f"{text}\n\n" for text in before), answer)


def _conversation(row: Row, turns: list[Turn], where: str) -> Messages:
    """Return the turns with what the columns beside them say."""
    system = row.get("system")
    system = text_of(system, f"{where} column 'system'") if isinstance(system, list) else system
    if system is not None and not isinstance(system, str):
        raise DataError(f"{where} column 'system' is {described(system)}, not a string: write a string.")
    if system:
        turns = turns[1:] if turns[0][0] == {"role": "system", "content": ""} else turns
        if not turns or turns[0][0]["role"] != "system":
            turns = [({"role": "system", "content": system}, True), *turns]
    silent = (i for i, (turn, learned) in enumerate(turns) if turn["role"] == "assistant" and not learned)
    return Messages([turn for turn, _ in turns], schemas(row.get("tools"), where), frozenset(silent))


def _side(row: Row, column: str, role: str, where: str, calls: bool) -> list[Turn]:
    """Return one half of a prompt and completion of which at least one is a list of turns; a text is a turn of
    ``role``.
    """
    value = _value(row, column, where)
    if isinstance(value, list):
        return _read_turns(row, column, where, calls) if value else []
    if isinstance(value, dict):
        raise DataError(f"{where} column {column!r} is {described(value)}: write a list of turns, or a string.")
    text = _answer(row, column, where) if column == "completion" else _text(row, column, where)
    return [({"role": role, "content": text}, True)] if text else []


def _read_turns(row: Row, column: str, where: str, calls: bool) -> list[Turn]:
    return [
        (message(turn, f"{where} {column}[{i}]", calls=calls), is_learned(turn))
        for i, turn in enumerate(_turns(row, column, where))
    ]


def _names(row: Row) -> str:
    return cut(", ".join(map(str, row))).encode(errors="backslashreplace").decode() or "none"


def _value(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise DataError(f"{where} has no column {column!r}, only {_names(row)}: add it, or rename with data columns.")
    return row[column]


def _text(row: Row, column: str, where: str) -> str:
    value = _value(row, column, where)
    if not isinstance(value, str):
        raise DataError(f"{where} column {column!r} is {described(value)}, not a string: write a string.")
    return value


def _answer(row: Row, column: str, where: str) -> str | None:
    """Return a text that may be null: an answer that got lost."""
    return None if _value(row, column, where) is None else _text(row, column, where)


def _turns(row: Row, column: str, where: str) -> list[Any]:
    value = _value(row, column, where)
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where} column {column!r} is {described(value)}, not a list of turns: write at least one turn."
        )
    return value

"""Rows of any accepted layout -> one of three kinds of example."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from raymem.errors import DataError
from raymem.training.data.readers import Row
from raymem.training.recipe import Source

Format = Literal["text", "prompt_completion", "messages", "alpaca", "sharegpt"]

# In the order in which ``auto`` looks: the most structured first, because such rows often have a rendered text too.
COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_OPTIONAL = ("input",)  # of alpaca
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
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

    ``messages`` are dicts with ``role`` and ``content`` (both str); other keys are handed to the chat template.
    """

    messages: list[dict[str, Any]]


Example = Text | PromptCompletion | Messages


def resolve_format(source: Source, first_row: Row, place: str) -> Format:
    """The format of a source: as the recipe says, or, for ``auto``, by the columns of its first row.

    Raises:
        DataError: ``columns`` names a column that does not exist, or the columns fit no format.
    """
    known = [*dict.fromkeys(name for names in COLUMNS.values() for name in names), *_OPTIONAL]
    for ours, theirs in source.columns.items():
        if ours not in known:
            raise DataError(f"{place}.columns: {ours!r} is no column of ours, the names are {', '.join(known)}.")
        if theirs not in first_row:
            near = difflib.get_close_matches(theirs, list(first_row), n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise DataError(
                f"{place}.columns.{ours}={theirs!r} is none of the data's columns {_names(first_row)}{hint}"
            )
    if source.format != "auto":
        return source.format
    row = _renamed(first_row, source.columns)
    for name, required in COLUMNS.items():
        if all(column in row for column in required):
            return name
    accepted = "; ".join(f"{' + '.join(required)} ({name})" for name, required in COLUMNS.items())
    raise DataError(
        f"{place}.format=auto finds columns {_names(row)}, which fit no format: rename them with {place}.columns to "
        f"one of: {accepted}."
    )


def to_example(row: Row, row_format: Format, columns: dict[str, str], place: str) -> Example:
    """One row as an example.

    Raises:
        DataError: a column is missing, or a value is not of the expected type; begins with ``place``.
    """
    row = _renamed(row, columns)
    if row_format == "text":
        return Text(_text(row, "text", place))
    if row_format == "prompt_completion":
        return PromptCompletion(_text(row, "prompt", place), _text(row, "completion", place))
    if row_format == "alpaca":
        instruction, answer = _text(row, "instruction", place), _text(row, "output", place)
        extra = _text(row, "input", place) if row.get("input") is not None else ""
        question = f"{instruction}\n\n{extra}" if extra else instruction
        return Messages([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    if row_format == "messages":
        return Messages(
            [_message(turn, f"{place} messages[{i}]") for i, turn in enumerate(_turns(row, "messages", place))]
        )
    turns = _turns(row, "conversations", place)
    return Messages([_sharegpt(turn, f"{place} conversations[{i}]") for i, turn in enumerate(turns)])


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _names(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


def _value(row: Row, column: str, place: str) -> Any:
    if column not in row:
        raise DataError(f"{place} has no column {column!r}, only {_names(row)}: add it, or rename with data columns.")
    return row[column]


def _text(row: Row, column: str, place: str) -> str:
    value = _value(row, column, place)
    if not isinstance(value, str):
        raise DataError(f"{place} column {column!r} is {_shown(value)}, not a string: write a string.")
    return value


def _turns(row: Row, column: str, place: str) -> list[Any]:
    value = _value(row, column, place)
    if not isinstance(value, list) or not value:
        raise DataError(f"{place} column {column!r} is {_shown(value)}, not a list of turns: write at least one turn.")
    return value


def _message(turn: Any, place: str) -> dict[str, Any]:
    # Parquet gives every message all the keys that any message has; the absent ones are None.
    message = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
        raise DataError(f"{place} is {_shown(turn)}: write an object with the strings role and content.")
    return message


def _sharegpt(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError(f"{place} is {_shown(turn)}: write an object with the strings from and value.")
    if turn.get("from") not in _SHAREGPT_ROLES:
        raise DataError(f"{place} is from {turn.get('from')!r}: use one of {', '.join(_SHAREGPT_ROLES)}.")
    return {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"

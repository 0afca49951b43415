"""The turns of a conversation, in the layouts in which they come -> what a chat template takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from raymem.errors import DataError
from raymem.text import shown
from raymem.training.data.rows.json_text import parsed_text

MARKS = ("weight", "train", "training", "trainable", "loss")
"""Keys of a turn that say whether it is learned; each layout has its own, and all are read in all layouts."""
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_ANSWERS = ("gpt", "assistant")
_TEXT_PARTS = ("text", "input_text", "output_text")


def mark(value: Any) -> bool | None:
    """Say whether a mark says that its turn is learned: True, False, or None where it says neither."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (0, "0", "0.0", "false", "no"):  # False == 0
        return False
    return True if word in (1, "1", "1.0", "true", "yes") else None


def is_learned(turn: dict[str, Any]) -> bool:
    """False where a mark of the turn says so."""
    return all(mark(turn[key]) is not False for key in MARKS if turn.get(key) is not None)


def message(turn: Any, where: str, *, calls: bool = True) -> dict[str, Any]:
    """Return a turn with role and content, without marks and nulls; ``content`` is a string, or None beside tool calls.

    Args:
        calls: give a call in the layout of before tools, ``function_call``, as ``tool_calls``.

    Raises:
        DataError: it is no such turn, or its content is more than text; begins with ``where``.
    """
    # Parquet gives every message all the keys that any message has; the absent ones are None.
    kept = {k: v for k, v in turn.items() if v is not None and k not in MARKS} if isinstance(turn, dict) else {}
    if "role" not in kept and "from" in kept:  # a turn of the other layout
        return sharegpt(turn, where, calls=calls)
    content = kept.get("content")
    if content is None and kept.get("role") == "assistant":
        content = None if kept.get("tool_calls") or kept.get("function_call") else ""  # an answer that got lost
    if not isinstance(kept.get("role"), str) or not (
        isinstance(content, str | list) or (content is None and (kept.get("tool_calls") or kept.get("function_call")))
    ):
        raise DataError(
            f"{where} is {described(turn)}: write an object with the strings role and content (content may be a list "
            f"of text parts, or null beside tool_calls)."
        )
    if calls and kept["role"] == "assistant" and isinstance(kept.get("function_call"), dict):
        function = kept.pop("function_call")
        kept.setdefault("tool_calls", [{"type": "function", "function": function}])
    return kept | {"content": text_of(content, where) if isinstance(content, list) else content}


def text_of(parts: list[Any], where: str) -> str:
    """Return the text of a list of parts, one after the other.

    Raises:
        DataError: a part is no text; begins with ``where``.
    """
    texts: list[str] = []
    for index, part in enumerate(parts):
        text = part
        if isinstance(part, dict):
            text = part.get("text") if part.get("type", "text") in _TEXT_PARTS else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else None
            what = f"of type {shown(kind)}" if kind is not None and kind not in _TEXT_PARTS else described(part)
            raise DataError(
                f"{where} content[{index}] is {what}, but only text is trained on: leave such examples out, or write "
                f'parts as {{"type": "text", "text": "..."}}.'
            )
        texts.append(text)
    return "".join(texts)


def sharegpt(turn: Any, where: str, *, calls: bool = True) -> dict[str, Any]:
    """Return a turn with from and value as :func:`message` has it.

    Args:
        calls: give a function call as ``tool_calls``; otherwise as the text that it is written in.

    Raises:
        DataError: it is no such turn; begins with ``where``.
    """
    if isinstance(turn, dict) and "from" not in turn and "role" in turn:  # a turn of the other layout
        return message(turn, where, calls=calls)
    is_lost = isinstance(turn, dict) and turn.get("value") is None and turn.get("from") in _ANSWERS
    if not isinstance(turn, dict) or not (is_lost or isinstance(turn.get("value"), str | list)):
        raise DataError(f"{where} is {described(turn)}: write an object with the strings from and value.")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise DataError(f"{where} is from {shown(speaker)}: use one of {', '.join(SHAREGPT_ROLES)}.")
    value = "" if is_lost else turn["value"]
    content = text_of(value, where) if isinstance(value, list) else value
    # Without role and content: they are said by from and value.
    left_out = ("from", "value", "role", "content", *MARKS)
    said: dict[str, Any] = {"role": SHAREGPT_ROLES[speaker], "content": content}
    said |= {k: v for k, v in turn.items() if v is not None and k not in left_out}
    if speaker in _CALLS and calls and (found := _calls(content)):
        said |= {"content": None, "tool_calls": found}
    return said


def _calls(text: str) -> list[dict[str, Any]]:
    """Return the calls that a text of JSON says, as a chat template takes them; none where it says something else."""
    try:
        value = parsed_text(text)
    except ValueError:
        return []
    calls = value if isinstance(value, list) else [value]
    functions = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        return []
    return [{"type": "function", "function": function} for function in functions]


def with_arguments(messages: list[dict[str, Any]], *, as_text: bool) -> list[dict[str, Any]]:
    """Return the messages with the arguments of their tool calls as JSON text, or as what such a text says."""

    def changed(call: Any) -> Any:
        function: Any = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if arguments is None or isinstance(arguments, str) == as_text:
            return call
        written = json.dumps(arguments, ensure_ascii=False) if as_text else _parsed(arguments)
        return call | {"function": function | {"arguments": written}}

    return [
        m | {"tool_calls": [changed(call) for call in m["tool_calls"]]} if isinstance(m.get("tool_calls"), list) else m
        for m in messages
    ]


def miswritten_arguments(messages: Sequence[dict[str, Any]], text: str) -> Literal["text", "object"] | None:
    """Return the form in which calls have arguments that ``text``, a rendering, holds quoted once more or as Python
    does.
    """
    for said in messages:
        for call in calls if isinstance(calls := said.get("tool_calls"), list) else []:
            function: Any = call.get("function") if isinstance(call, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                escaped = json.dumps(arguments, ensure_ascii=False)
                if escaped[1:-1] != arguments and escaped in text:
                    return "text"
            elif arguments and str(arguments) != json.dumps(arguments, ensure_ascii=False) and str(arguments) in text:
                return "object"
    return None


def schemas(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return a ``tools`` column: a list of schemas, the JSON text of one, or a list of such texts; None where it is
    empty.

    Raises:
        DataError: it is none of these; begins with ``where``.
    """
    read = _parsed(value)
    read = [_parsed(tool) for tool in read] if isinstance(read, list) else [read] if isinstance(read, dict) else read
    if read is None or read in ("", [], [{}]):
        return None
    if not isinstance(read, list) or not all(isinstance(tool, dict) for tool in read):
        raise DataError(
            f"{where} column 'tools' is {described(value)}, not a list of tools: write a list of JSON schemas, "
            f"or the JSON text of one."
        )
    return read


def history(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a ``history`` column, pairs of what the user and the assistant said before, as turns.

    Raises:
        DataError: it is something else; begins with ``where``.
    """
    pairs = _parsed(value)
    if pairs is None or pairs == "":
        return []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(said, str) for said in pair)
        for pair in pairs
    ):
        raise DataError(
            f"{where} column 'history' is {described(value)}: write a list of pairs of strings, "
            "[[user, assistant], ...]."
        )
    return [
        {"role": role, "content": said}
        for pair in pairs
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def roles_of(messages: Sequence[dict[str, Any]]) -> str:
    """Return the roles of messages for an error message."""
    roles = [str(message["role"]) for message in messages]
    return ", ".join(roles if len(roles) <= 8 else [*roles[:6], "...", roles[-1]]) or "none"


def described(value: Any) -> str:
    """Type and value for an error message."""
    return f"{type(value).__name__} {shown(value)}"


def _parsed(value: Any) -> Any:
    """JSON text as what it says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parsed_text(value)
    except ValueError:
        return value.strip()

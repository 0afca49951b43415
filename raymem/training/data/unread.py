"""Finds parts of rows that nobody reads: they have no influence on the training, so the user should hear of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raymem.training.data.formats import Format, columns_read, in_our_names
from raymem.training.data.rows.tables import Row
from raymem.training.data.turns import MARKS, SHAREGPT_ROLES, mark

# fmt: off
_DESCRIPTIVE = frozenset({
    "id", "idx", "index", "uuid", "guid", "hash", "source", "origin", "dataset", "url", "link", "title", "author",
    "category", "topic", "domain", "subset", "split", "tags", "lang", "language", "license", "date", "time",
    "timestamp", "created", "created_at", "updated_at", "version", "meta", "metadata",
})
# fmt: on
_CONVERSATIONS = ("messages", "conversations", "prompt", "completion")
_SAID = {"role", "content", "from", "value"}
_SHOWN = 12


def unread(
    row: Row,
    row_format: Format,
    columns: dict[str, str],
    in_template: Callable[[str], bool],
    *,
    as_turns: bool = True,
) -> Iterator[str]:
    """Name the unread parts of a row that has been read as an example, as its data name them.

    What only describes a row (an id, where it comes from) is left out, and so is what is empty.

    Args:
        in_template: whether the chat template reads a key.
        as_turns: the row became a conversation.
    """
    ours = in_our_names(row, columns)
    read = columns_read(row_format, as_turns=as_turns)
    for name, value in ours.items():
        theirs = columns.get(name, name)
        if name not in read or (name == "tools" and not in_template("tools")):
            if not _says_nothing(theirs, value):
                yield theirs
        elif name == "system" and _other_system({key: ours.get(key) for key in read}, value):
            yield f"{theirs} (beside another system turn)"
        elif name in _CONVERSATIONS and isinstance(value, list):
            for turn in value:
                yield from _unread_keys(turn, f"{theirs}[].", in_template)


def line(where: str, counts: Mapping[str, int]) -> str:
    """The one line that is said about a source, for what :func:`unread` found in how many rows or turns."""
    most = sorted(counts, key=lambda name: (-counts[name], name))
    names = [f"{name} in {counts[name]}".encode(errors="backslashreplace").decode() for name in most[:_SHOWN]]
    more = f", and {len(most) - _SHOWN} more" if len(most) > _SHOWN else ""
    return (
        f"{where}: neither raymem nor the chat template reads {', '.join(names)}{more} (counted in rows, or in turns "
        f"where the name has []): it does not change what is trained. If it should, rename it with data columns."
    )


def _unread_keys(turn: dict[str, Any], prefix: str, in_template: Callable[[str], bool]) -> Iterator[str]:
    role = SHAREGPT_ROLES.get(turn["from"]) if "value" in turn and "from" in turn else turn.get("role")
    for key, value in turn.items():
        if key in _SAID or value is None:
            continue
        if key in MARKS:
            if (says := mark(value)) is None:
                yield f"{prefix}{key} that says neither yes nor no"
            elif says and role != "assistant":
                yield f"{prefix}{key} of a turn that is not the assistant's"
        elif key == "function_call" and in_template("tool_calls"):
            continue  # it is read as one of these
        elif not _says_nothing(key, value) and not in_template(key):
            yield f"{prefix}{key}"


def _says_nothing(name: str, value: Any) -> bool:
    lower = name.lower()
    return lower in _DESCRIPTIVE or lower.endswith("_id") or value is None or value in ("", [], {})


def _other_system(read: Row, text: Any) -> bool:
    """Say whether the conversation that is read begins with a system turn that says something else than the column."""
    turns: list[Any] = next((read[name] for name in _CONVERSATIONS if isinstance(read.get(name), list)), [])
    first = turns[0] if turns else {}
    own = first.get("content", first.get("value")) if first.get("role", first.get("from")) == "system" else None
    return bool(text) and own not in ("", None, text)

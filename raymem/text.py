"""Makes texts fit to be shown: cut where they are long, without characters that a terminal obeys."""

from __future__ import annotations

import unicodedata
from typing import Any

_VALUE = 120
_TEXT = 600
MESSAGE = 3500
"""Characters of one error, all lines together."""


_UNPRINTABLE = ("Cc", "Cs")
"""Categories of Unicode: control characters, which a terminal obeys, and halves of characters, which none can show."""
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters after which a terminal shows text in another order than it is in."""


def printable(text: str) -> str:
    """Return a text that a terminal shows and does not obey: control characters but line breaks and tabs are written
    out, such as ``\\x1b``.
    """
    return "".join(
        repr(c)[1:-1] if (unicodedata.category(c) in _UNPRINTABLE and c not in "\n\t") or c in _REORDERING else c
        for c in text
    )


def shown(value: Any) -> str:
    """Return the ``repr`` of a value, cut where it is long."""
    if isinstance(value, str) and len(value) > _VALUE:
        return f"{value[:_VALUE]!r}... ({len(value)} characters)"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of over 4300 digits, or endless nesting
        return f"a very large {type(value).__name__}"
    return text if len(text) <= _VALUE else f"{text[:_VALUE]}... ({len(text)} characters)"


def cut(text: str, limit: int = _TEXT) -> str:
    """Take the middle out of a long text: errors begin with the place, and end with the cure."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end]} [...] {text[-end:]}"


def joined(lines: list[str], limit: int = MESSAGE) -> str:
    """Join the lines of an error, and say how many are left out after ``limit`` characters."""
    kept: list[str] = []
    length = 0
    for line in map(cut, lines):
        length += len(line) + 1
        if length > limit:
            break
        kept.append(line)
    left = len(lines) - len(kept)
    return "\n".join([*kept, *([f"and {left} more problems"] if left else [])])

"""Writes a recipe as YAML in which every line can have a comment."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from raymem.recipe.yaml_text import parse

_PLAIN = re.compile(r"[A-Za-z/.~][\w./@+-]*")
_LONGEST_COMMENT = 100


def text_of(sections: Mapping[str, Any], comments: Mapping[str, str], head: str) -> str:
    """Return the text of a recipe.

    Args:
        sections: its plain dict. A value of None stands for a key that is only shown, commented out.
        comments: path of a key -> what is said behind it.
        head: the comment at the top.
    """
    lines = [f"# {_clean(head)}", *_lines(sections, comments, "", "")]
    return "\n".join(lines) + "\n"


def _lines(values: Mapping[str, Any], comments: Mapping[str, str], path: str, indent: str) -> Iterator[str]:
    for key, value in values.items():
        at = f"{path}{key}"
        comment = f" # {_clean(comments[at])}" if comments.get(at) else ""
        if value is None:
            yield f"{indent}# {key}:{comment}"
        elif isinstance(value, Mapping) and key != "columns":
            yield f"{indent}{key}:{comment}"
            yield from _lines(value, comments, f"{at}.", f"{indent}  ")
        else:
            yield f"{indent}{key}: {_value(value)}{comment}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and parse(value) == value else json.dumps(value)
    if isinstance(value, float) and not 1e-3 <= value < 1e6:
        return re.sub(r"e-0?", "e-", f"{value:.1e}")
    return json.dumps(value)


def _clean(comment: str) -> str:
    """Keep a comment on its line, whatever the names in it."""
    line = "".join(c if c.isascii() and c.isprintable() else "?" for c in " ".join(comment.split()))
    return line if len(line) <= _LONGEST_COMMENT else f"{line[:_LONGEST_COMMENT]}..."

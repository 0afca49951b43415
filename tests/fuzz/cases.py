"""What fuzzing asks of every case, and what odd values are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from raymem.errors import RaymemError

LONGEST = 4000
"""Characters of an error; a recipe's may have several lines, anything else has one."""
SECONDS = 10
MEMORY_BYTES = 2 << 30

TEXTS = (
    *("", "!!int abc", "!!timestamp q", "2026-02-31", "010", "1:30", "yes", "&a [*a]", "{a: 1, a: 2}", "~nosuchuser/x"),
    *(
        "http://x@h",
        "9" * 200,
        "1e999",
        ".nan",
        "[[[[[[",
        '"\\0"',
        '"\\ud800"',
        "x" * 3000,
        "? [a]",
        "<<: 3",
        "/dev/zero",
    ),
    *(
        "\ud800",
        "a\0b",
        "\u202e\u0301",
        "{{ 1/0 }}",
        "{% for",
        "<|im_end|>",
        "../..",
        "/proc/self/environ",
        "NaN",
        "null",
    ),
)
ODD = st.sampled_from(TEXTS)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**4000, -(2**63), 2**31, 1e308, True])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20) | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
DEEP = ("[" * 200_000, '{"a":' * 5000, "[" * 700 + "]" * 700)


@dataclass(frozen=True)
class Target:
    """A way in for input from outside."""

    cases: st.SearchStrategy[Any]
    use: Callable[[Any], Any]
    """Takes a case; returns a value or raises an error for the user."""


def check(target: Target, case: Any) -> str:
    """Return the sentence that a case gives, or "" where it gives a value; anything else is raised."""
    try:
        target.use(case)
    except RaymemError as error:
        said = str(error)
        assert 0 < len(said) <= LONGEST, f"an error of {len(said)} characters: {said[:200]!r}"
        said.encode()  # somebody will print it
        return said
    return ""

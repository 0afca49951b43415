"""Times in a recipe, as people write them: ``10m``, ``90s``, ``1.5h``, or a number of seconds."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from raymem.recipe.text import shown

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_MOST_DAYS = 30


def parse_duration(value: str | float) -> float:
    """Return seconds.

    Raises:
        ValueError: not a time, none at all, or more than 30 days.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{0,9})?)\s*([smhd]?)\s*", value)
        if match is None:
            raise ValueError(f"{shown(value)} is no time; write it as 90s, 10m or 1.5h")
        seconds = float(match[1]) * _SECONDS[match[2]]
    else:
        seconds = float(value)
    if not 0 < seconds <= _MOST_DAYS * _SECONDS["d"]:
        raise ValueError(f"{shown(value)} is outside (0, {_MOST_DAYS}d]; write a time such as 90s, 10m or 1.5h")
    return seconds


def _checked(value: str | float) -> str | float:
    parse_duration(value)
    return value


Duration = Annotated[str | float, AfterValidator(_checked)]
"""Kept as it was written; :func:`parse_duration` gives the seconds."""

"""Compares recipes: what differs between runs, key by key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ABSENT = "-"


@dataclass(frozen=True)
class Difference:
    """A key of the recipe whose value is not the same in all runs."""

    path: str
    values: list[str]


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Return the keys in which recipes differ, in the order in which they come; their names are left out."""
    flat = [dict(_flat(recipe, "")) for recipe in recipes]
    paths = dict.fromkeys(path for values in flat for path in values)
    rows = [Difference(path, [values.get(path, _ABSENT) for values in flat]) for path in paths if path != "name"]
    return [row for row in rows if len(set(row.values)) > 1]


def _flat(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [leaf for key, item in value.items() for leaf in _flat(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [leaf for index, item in enumerate(value) for leaf in _flat(item, f"{path}[{index}]")]
    return [(path, value if isinstance(value, str) else json.dumps(value))]

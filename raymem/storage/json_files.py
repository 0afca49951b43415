"""Reads small JSON files that people and other programs may have touched: what is wrong with one is said in a sentence.

Every problem names the file, what is wrong with it and a cure, as an error of the caller's kind: a file that is cut
short, nested without end or larger than any that raymem writes, a list in place of an object, a text in place of a
number.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymem.text import shown

LIMIT_BYTES = 128 << 20
"""More than the longest manifest of a checkpoint; beyond it a file is something else by a wrong name."""

_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def parse(raw: bytes | str, where: object, error: type[Exception], cure: str = "") -> Any:
    """Return the value of a JSON text.

    Args:
        where: the file, for the message.
        error: what is raised.
        cure: what mends it.
    """
    cure = f"; {cure}" if cure else ""
    if len(raw) > LIMIT_BYTES:
        raise error(f"{where} has more than {LIMIT_BYTES >> 20} MiB, which no such file has{cure}")
    try:
        return json.loads(raw)
    except RecursionError:
        raise error(f"{where} is not JSON that can be read (nested too deeply){cure}") from None
    except ValueError as problem:
        raise error(f"{where} is not JSON ({problem}){cure}") from None


def as_object(
    value: Any,
    where: object,
    error: type[Exception],
    cure: str = "",
    fields: Mapping[str, tuple[type, ...]] | None = None,
) -> dict[str, Any]:
    """Return a value that is a JSON object and has its fields.

    Args:
        fields: the types that a value may have; one that may be null may be missing too.
    """
    cure = f"; {cure}" if cure else ""
    if not isinstance(value, dict):
        raise error(f"{where} holds {_name(value)} in place of an object{cure}")
    for name, types in (fields or {}).items():
        if type(found := value.get(name)) in types or (float in types and type(found) is int):
            continue
        if name not in value:
            raise error(f"{where} has no {name}{cure}")
        wanted = " or ".join(_NAMES[one] for one in types)
        raise error(f"{where}: {name} is {_name(found)} ({shown(found)}) in place of {wanted}{cure}")
    return value


def read_object(
    path: Path, error: type[Exception], cure: str = "", fields: Mapping[str, tuple[type, ...]] | None = None
) -> dict[str, Any]:
    """Return the JSON object in a local file; see :func:`parse` and :func:`as_object`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no regular file")  # reading a device or a pipe may never end
        with path.open("rb") as file:
            raw = file.read(LIMIT_BYTES + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror or problem})" + (f"; {cure}" if cure else "")) from None
    return as_object(parse(raw, path, error, cure), path, error, cure, fields)


def _name(value: Any) -> str:
    return _NAMES[type(value)]

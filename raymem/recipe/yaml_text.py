"""Reads and writes YAML as plain values: scalars by the core schema of YAML 1.2, within limits, and nothing else.

PyYAML's own constructors follow YAML 1.1, in which ``010`` is 8, ``1:30`` is 90, ``no`` is false and a date becomes an
object; its composer recurses as deep as the text does, and lets a few lines of aliases stand for gigabytes. So only its
events are used here. ``<<`` stays what it was, since recipes use it to share sections.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from raymem.text import cut, shown

MAX_CHARACTERS = 200_000
MAX_VALUES = 10_000
MAX_DEPTH = 50
_MAX_DIGITS = 100
_TOO_DEEP = f"nested more than {MAX_DEPTH} deep; write it flatter"

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


class YamlTextError(ValueError):
    """A text that is not read.

    Args:
        problem: what is wrong, and the cure where it is not plain.
        line: where, counted from 1.
    """

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(cut(" ".join(problem.split()), 300))
        self.line = line


def parse(text: str) -> Any:
    """Return the one value in a YAML text; an empty text is None.

    Raises:
        YamlTextError: malformed, ambiguous (a key given twice), or beyond the limits.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlTextError(f"the text is longer than {MAX_CHARACTERS} characters; is this the right file?")
    return _Reader(text).document()


def write(value: Any, **options: Any) -> str:
    """Return plain values as YAML text that :func:`parse` reads back.

    Args:
        options: of ``yaml.dump``.
    """
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, **options))


class _Dumper(yaml.SafeDumper):
    """Quotes texts that are numbers in YAML 1.2 but not in 1.1, and writes a value that occurs twice out twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in (("int", _INT), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern.pattern})$"), list("-+.0123456789"))


class _Reader:
    """Builds values from the events of a text."""

    def __init__(self, text: str) -> None:
        self._events = _events(text)
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._open: set[str] = set()
        self._values = 0

    def document(self) -> Any:
        next(self._events)  # the stream begins
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events), 0)
        next(self._events)  # the document ends
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise YamlTextError("a second document begins here (---); keep one", _line(event))
        return value

    def _count(self, values: int, event: yaml.Event) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise YamlTextError(f"over {MAX_VALUES} values, aliases (*name) written out; write fewer", _line(event))

    def _value(self, event: yaml.Event, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        assert isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH:
            raise YamlTextError(_TOO_DEEP, _line(event))
        self._count(1, event)
        before, anchor = self._values - 1, event.anchor
        if anchor is not None:
            self._anchors.pop(anchor, None)
            self._open.add(anchor)
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            _check_tag(event, "seq")
            value = []
            while not isinstance(inner := next(self._events), yaml.SequenceEndEvent):
                value.append(self._value(inner, depth + 1))
        else:
            _check_tag(event, "map")
            value = self._mapping(depth)
        if anchor is not None:
            self._open.discard(anchor)
            self._anchors[anchor] = value, self._values - before
        return value

    def _alias(self, event: yaml.AliasEvent) -> Any:
        name = str(event.anchor)
        if name in self._open:
            raise YamlTextError(f"*{shown(name)[1:-1]} stands inside of what it refers to; write it out", _line(event))
        if name not in self._anchors:
            raise YamlTextError(f"*{shown(name)[1:-1]} has no &{shown(name)[1:-1]} before it; add it", _line(event))
        value, values = self._anchors[name]
        self._count(values, event)
        return copy.deepcopy(value)  # an override of one place leaves the others

    def _mapping(self, depth: int) -> dict[Any, Any]:
        own: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        merged: dict[Any, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            is_merge = isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]
            key = self._value(event, depth + 1)
            if isinstance(key, dict | list):
                raise YamlTextError("a key is a list or mapping; write a single word", _line(event))
            value = self._value(next(self._events), depth + 1)
            if key in lines:
                raise YamlTextError(
                    f"{shown(key)} is given twice, first in line {lines[key]}; keep one of them", _line(event)
                )
            lines[key] = _line(event)
            if is_merge:
                for mapping in value if isinstance(value, list) else [value]:
                    if not isinstance(mapping, dict):
                        raise YamlTextError("<<: takes a mapping or a list of them, as in <<: *name", _line(event))
                    merged = {**mapping, **merged}
            else:
                own[key] = value
        return {**merged, **own}


class _Loader(yaml.SafeLoader):
    """Stops at deep brackets while it looks ahead for the end of the first, which takes the square of their number."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level > MAX_DEPTH:
            raise YamlTextError(_TOO_DEEP, self.line + 1)
        super().fetch_flow_collection_start(token)


def _events(text: str) -> Iterator[yaml.Event]:
    try:
        yield from yaml.parse(text, _Loader)
    except YamlTextError:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlTextError(f"the character {chr(int(error.character))!a} may not stand in YAML", line) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise YamlTextError(getattr(error, "problem", None) or str(error), mark.line + 1 if mark else None) from None
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF", %YAML 1.<5000 digits>
        raise YamlTextError(f"a number in an escape or directive is too large ({error})") from None


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _check_tag(event: Any, own: str) -> None:
    if event.tag not in (None, "!", _TAG + own):
        raise YamlTextError(_wrong_tag(event.tag), _line(event))


def _wrong_tag(tag: str) -> str:
    return f"the tag {shown(tag.replace(_TAG, '!!'))} does not belong here; leave it out"


def _scalar(event: yaml.ScalarEvent) -> Any:
    text = str(event.value)
    if found := _UNUSABLE.search(text):
        raise YamlTextError(f"the character {found[0]!a} may not stand in a text; leave it out", _line(event))
    try:
        if event.tag is None:
            return _plain(text) if event.implicit[0] else text
        if event.tag in ("!", f"{_TAG}str"):
            return text
        kind = event.tag.removeprefix(_TAG)
        if kind not in ("null", "bool", "int", "float"):
            raise YamlTextError(_wrong_tag(event.tag))
        value = _plain(text)
        if kind == "float" and type(value) is int:
            return float(value)
        if type(value).__name__ != {"null": "NoneType"}.get(kind, kind):
            raise YamlTextError(f"{shown(text)} is no !!{kind}; leave the tag out")
        return value
    except YamlTextError as error:
        error.line = _line(event)
        raise


def _plain(text: str) -> Any:
    """Read a scalar without quotes by YAML 1.2's core schema."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            raise YamlTextError(f"an integer of {len(text)} digits; write at most {_MAX_DIGITS}, or quotes around it")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        if text[-1] in "fFnN":
            return float(text.replace(".", "", 1))
        value = float(text)
        if math.isinf(value):
            raise YamlTextError(f"{shown(text)} is too large for a number; write a smaller one, or quotes around it")
        return value
    return text

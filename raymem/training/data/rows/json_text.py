"""Reads JSON that other people have written: one value, or the elements of a list one after the other.

A value that is read can be handled: it is nested at most :data:`MAX_DEPTH` deep, no key of it is given twice, and its
texts are whole characters. Nothing is read much further than the limit of one example.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from raymem.text import shown

MAX_DEPTH = 100
"""The largest depth of lists and objects in a row; Python's own walks end at 1000."""
_CHUNK_BYTES = 1 << 18
_LONGEST_TOKEN = 16
"""More than the characters that a token without quotes, or an escape within them, may have."""
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep: write it flatter, or leave it out"


class Unusable(ValueError):
    """What is wrong with a JSON text.

    Args:
        problem: in words; with the cure, if it is valid JSON.
        line: where, counted from 1.
        is_json: whether it is valid JSON.
    """

    def __init__(self, problem: str, line: int = 1, *, is_json: bool = True) -> None:
        super().__init__(problem)
        self.line = line
        self.is_json = is_json


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Unusable(f"the key {shown(twice)} is given twice; keep one of them")
    return row


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def decode(raw: bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        Unusable: it is none, or one that cannot be handled.
    """
    try:
        text = raw.decode("utf-8-sig")
        value = _JSON.decode(text)
    except Unusable:
        raise
    except RecursionError:
        raise Unusable(_TOO_DEEP) from None
    except ValueError as error:
        raise _unusable(error) from None
    return _handled(value, text)


def parsed_text(text: str) -> Any:
    """Return the value of JSON within a text of a row.

    Raises:
        ValueError: the text is something else, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise Unusable(_TOO_DEEP) from None
    return _handled(value, text)


class Elements:
    """The elements of the JSON list in a file, of which never much more than one is in memory.

    Args:
        file: at its start, or where an element begins.
        max_bytes: of one element.
        offset: the file's position.
        line: the number of the line there.
    """

    def __init__(self, file: BinaryIO, max_bytes: int, offset: int = 0, line: int = 1) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._offset, self._line = offset, line
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (byte at which it begins, its line, value) of each element.

        Raises:
            Unusable: the list is malformed, or an element is too long or cannot be handled.
        """
        if self._offset == 0:
            if self._next() == "\ufeff":
                self._advance(self._at + 1)
            self._expect("[")
            if self._next() == "]":
                return self._finish()
        while True:
            self._next()
            begin, line = self._offset, self._line
            yield begin, line, self._element()
            if self._next() == "]":
                return self._finish()
            self._expect(",")

    def _element(self) -> Any:
        while True:
            try:
                value, end = _JSON.raw_decode(self._text, self._at)
                problem, at = "", end
                if end < len(self._text) or self._ended:  # a number may go on
                    break
            except Unusable as error:
                raise Unusable(str(error), self._line) from None
            except RecursionError:
                raise Unusable(_TOO_DEEP, self._line) from None
            except json.JSONDecodeError as error:
                problem, at = error.msg, error.pos
                is_cut = problem.startswith("Unterminated string") or at > len(self._text) - _LONGEST_TOKEN
                if self._ended or not is_cut:
                    raise Unusable(problem, self._line_at(at), is_json=False) from None
            except ValueError as error:
                raise _unusable(error, self._line) from None
            if len(self._text) - self._at > self._max_bytes:
                raise self._too_long()
            self._more()
        text = self._text[self._at : end]
        if len(text.encode()) > self._max_bytes:
            raise self._too_long()
        line = self._line
        self._advance(end)
        try:
            return _handled(value, text)
        except Unusable as error:
            raise Unusable(str(error), line) from None

    def _next(self) -> str:
        """Return the next character that is no white space, without taking it; "" at the end."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in " \t\r\n":
                end += 1
            self._advance(end)
            if end < len(self._text):
                return self._text[end]
            if self._ended:
                return ""
            self._more()

    def _expect(self, sign: str) -> None:
        if (actual := self._next()) != sign:
            problem = f"Expecting {sign!r}, found {actual!r}" if actual else "it ends within the list"
            raise Unusable(problem, self._line, is_json=False)
        self._advance(self._at + 1)

    def _finish(self) -> None:
        self._expect("]")
        if actual := self._next():
            raise Unusable(f"{actual!r} follows the end of the list", self._line, is_json=False)

    def _advance(self, end: int) -> None:
        passed = self._text[self._at : end]
        self._offset += len(passed.encode())
        self._line += passed.count("\n")
        self._at = end

    def _more(self) -> None:
        rest = self._text[self._at :]
        chunk = self._file.read(max(_CHUNK_BYTES, len(rest)))
        self._ended = not chunk
        try:
            self._text, self._at = rest + self._decoder.decode(chunk, final=self._ended), 0
        except UnicodeDecodeError as error:
            raise Unusable(f"it is not UTF-8 ({error.reason})", self._line_at(len(self._text)), is_json=False) from None

    def _line_at(self, position: int) -> int:
        return self._line + self._text.count("\n", self._at, position)

    def _too_long(self) -> Unusable:
        return Unusable(too_long(self._max_bytes), self._line)


def too_long(max_bytes: int) -> str:
    """Say that an example is longer than the limit, and what can be done."""
    return (
        f"the example has more than {max_bytes} bytes, the limit of data.max_example_bytes: split it, leave it out, or "
        "raise the limit (making tokens of a text takes up to 350 times its memory)"
    )


def half_character(error: UnicodeEncodeError) -> str:
    """Say which half of a character a text holds, where, and what can be done."""
    near = error.object[max(error.start - 20, 0) : error.start].rpartition('"')[2]
    return (
        f"{error.object[error.start]!a} after {near!a}, which is half of a character (a lone surrogate, as where an "
        "emoji was cut in two): remove it, or write the whole character"
    )


def _handled(value: Any, text: str) -> Any:
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise Unusable(_TOO_DEEP)
    if "\\u" in text and ("\\ud" in text or "\\uD" in text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise Unusable(f"it holds {half_character(error)}") from None
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def _unusable(error: ValueError, line: int = 1) -> Unusable:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return Unusable(str(error), line, is_json=False)
    return Unusable("an integer has over 4300 digits: write it as a text", line)  # no other ValueError is raised

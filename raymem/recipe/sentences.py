"""Turns pydantic's errors about a recipe into sentences."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from typing_extensions import TypeAliasType

from raymem.recipe.base import fields_of, is_recipe_model, kind_of
from raymem.text import cut, shown

SENTENCE = "raymem_sentence"
"""The type of an error whose message is the sentence itself, and whose location is the path in the YAML file."""


def problems(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """List one ``path: sentence`` per problem.

    Args:
        root: class that was validated.
    """
    texts: dict[str, str] = {}
    for item in error.errors():
        if item["type"] == SENTENCE:
            path, text = ".".join(str(part) for part in item["loc"] if part != "").replace(".[", "["), item["msg"]
        else:
            path, fields = _resolve(item["loc"], root)
            path, text = _beside_kind(item, path) or _at_field(item, path, fields)
        # A union reports every arm that failed; one line per place is what a person can act on.
        texts[path] = f"{texts[path]}, or {text.partition(': ')[2]}" if path in texts else text
    return [f"{cut(path, 200)}: {cut(text)}" if path else cut(text) for path, text in texts.items()]


def sentence(item: Any, path: str, fields: Iterable[str]) -> str:
    """Put one error of pydantic in words that name the value and the rule.

    Args:
        path: dotted path in the YAML file.
        fields: names that are valid where its last part stands.
    """
    kind, message, value = item["type"], item["msg"], item.get("input")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key{nearest(path.rpartition('.')[2], fields)}"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        expected = _names(item["ctx"]["expected"])
        return f"{shown(value)} is not one of {', '.join(expected)}{nearest(str(value), expected)}"
    if kind == "value_error":
        return str(message.removeprefix("Value error, "))
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        return f"{shown(value)}: expected keys with values (a YAML mapping)"
    return f"{shown(value)}: {message[0].lower()}{message[1:]}{_in_yaml(kind, value)}"


def _in_yaml(kind: str, value: Any) -> str:
    """End an error about a text that was meant as a number, or as true or false, in other versions of YAML."""
    if not isinstance(value, str):
        return ""
    if kind.startswith("bool") and value.lower() in ("yes", "no", "on", "off", "y", "n"):
        return "; write true or false"
    if kind.startswith(("int", "float")) and re.fullmatch(r"[-+]?[0-9][0-9_:.]*", value) and len(value) < 50:
        return "; write it as a plain number, without quotes, _ and :"
    return ""


def _beside_kind(item: Any, path: str) -> tuple[str, str] | None:
    """Explain a ``kind`` (or ``type``) that is missing or unknown by path and sentence; None for other errors."""
    context = item.get("ctx") or {}
    if item["type"] == "union_tag_not_found":
        return f"{path}.{context['discriminator'].strip(chr(39))}", "is missing"
    if item["type"] == "union_tag_invalid":
        value, expected = context["tag"], _names(context["expected_tags"])
        tag = context["discriminator"].strip("'")
        return f"{path}.{tag}", f"{shown(value)} is not one of {', '.join(expected)}{nearest(str(value), expected)}"
    return None


def _at_field(item: Any, path: str, fields: Iterable[str]) -> tuple[str, str]:
    """Return path and sentence; a field that the message of an options' own rule names becomes part of the path."""
    text = sentence(item, path, fields)
    name, separator, rest = text.partition(": ")
    if item["type"] == "value_error" and separator and name in fields:
        return f"{path}.{name}", rest
    return path, text


def _names(text: Any) -> list[str]:
    return [name.strip("' ") for name in str(text).replace(" or ", ",").split(",")]


def _resolve(location: Sequence[int | str], root: type[BaseModel]) -> tuple[str, list[str]]:
    """Return the dotted YAML path of a pydantic location, and the names that are valid for its last part.

    pydantic puts union tags (``lora``) and arms (``constrained-int``) into the location; they are no part of the YAML.
    """
    parts: list[str] = []
    sections: list[type] = [root]
    fields: list[str] = list(fields_of(root))
    keyed = False
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if keyed:  # the key of a mapping whose values are sections
            parts.append(str(part))
            keyed = False
            continue
        if isinstance(part, int):
            if parts:
                parts[-1] += f"[{part}]"
                continue
            part = str(part)  # a key that is no text
        tagged = [s for s in sections if kind_of(s) == part]
        if tagged:
            sections, fields = tagged, list(fields_of(tagged[0]))
            continue
        owners = [s for s in sections if part in fields_of(s)]
        if not owners and not last:
            continue
        if not owners and sections == []:  # the arm of a union of plain types
            continue
        parts.append(part)
        fields = sorted({name for s in sections for name in fields_of(s)})
        keyed = any(_is_mapping(fields_of(s)[part]) for s in owners)
        sections = [inner for s in owners for inner in sections_in(fields_of(s)[part])]
    return ".".join(parts), fields


def _is_mapping(annotation: Any) -> bool:
    """Say whether an annotation is a mapping to sections, perhaps an optional one."""
    if typing.get_origin(annotation) is dict:
        return bool(sections_in(annotation))
    return any(_is_mapping(argument) for argument in typing.get_args(annotation))


def sections_in(annotation: Any) -> list[type]:
    """List every recipe section that an annotation can hold."""
    if is_recipe_model(annotation):
        return [annotation]
    if isinstance(annotation, TypeAliasType):
        return sections_in(annotation.__value__)
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_args(annotation):
        return [section for argument in typing.get_args(annotation) for section in sections_in(argument)]
    return []


def nearest(name: str, candidates: Iterable[str]) -> str:
    """End an error about an unknown name: with the name that was probably meant, or with all valid names."""
    close = difflib.get_close_matches(name[:100], list(candidates), n=1, cutoff=0.5)
    listed = sorted(candidates)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(listed)}"

"""Lets pydantic read an axis of a recipe by the options class of the kind that it names, whoever registered it."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from raymem.errors import RecipeError
from raymem.recipe.axes import Axis
from raymem.recipe.base import fields_of
from raymem.recipe.sentences import SENTENCE, nearest, sentence
from raymem.text import shown


class AxisField:
    """Annotation of a recipe's field whose value is the options of one kind of ``axis``."""

    def __init__(self, axis: Axis[Any]) -> None:
        self.axis = axis

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(_dump)
        return core_schema.no_info_plain_validator_function(self.options, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"title": self.axis.name}  # recipe_schema puts in what is registered by then

    def options(self, value: Any) -> Any:
        """Return the validated options.

        Raises:
            ValidationError: its locations are paths below the axis, its messages sentences.
        """
        raw = self.axis.spelled_out(value)
        if not isinstance(raw, Mapping):
            raise _problem(f"{shown(value)}: expected keys with values (a YAML mapping)")
        name = raw["kind"]
        if not isinstance(name, str) or name not in self.axis:
            known = list(self.axis)
            text = f"{shown(name)} is not one of {', '.join(known)}{nearest(str(name), known)}"
            raise self._error(raw, [("kind", text)])
        try:
            options = self.axis[name].options
        except RecipeError as error:
            raise self._error(raw, [("kind", str(error).partition(": ")[2])]) from None
        fields = fields_of(options)
        if unknown := [key for key in raw if key not in fields]:
            raise self._error(raw, [(str(key), f"unknown key{nearest(str(key), fields)}") for key in unknown])
        try:
            return adapter_of(options).validate_python(_with_tuples(raw, fields))
        except ValidationError as error:
            problems = [_located(item, fields) for item in error.errors()]
            if isinstance(value, list):  # a person wrote no name for it
                problems = [(path.removeprefix(self.axis.list_option), text) for path, text in problems]
            raise self._error(raw, problems) from None

    def _error(self, raw: Any, problems: Iterable[tuple[str, str]]) -> ValidationError:
        details = [InitErrorDetails(type=_problem(text), loc=(path,), input=raw) for path, text in problems]
        return ValidationError.from_exception_data(self.axis.name, details)


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError(SENTENCE, "{text}", {"text": text})


class _FromMapping:
    """Lets a strict dataclass be written as a mapping; its fields stay strict."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        schema = handler(source)
        handler.resolve_ref_schema(schema)["strict"] = False  # type: ignore[index]
        return schema


@functools.cache
def adapter_of(options: type) -> TypeAdapter[Any]:
    """Read and writes the options of a kind."""
    read: Any = typing.Annotated[options, _FromMapping()]
    return TypeAdapter(read)


def _dump(options: Any) -> Any:
    kind: Any = type(options)
    return adapter_of(kind).dump_python(options, mode="json")


def _located(item: Any, fields: Iterable[str]) -> tuple[str, str]:
    """Return, for an error of the options, its path below the axis and its sentence."""
    path = ""
    for index, part in enumerate(item["loc"]):
        if isinstance(part, int):
            path += f"[{part}]"
        elif index == 0:  # what follows are arms of a union
            path = part
        elif item["type"] == SENTENCE:  # of nested options, whose places are exact
            path += f".{part}"
    if item["type"] == SENTENCE:
        return path, item["msg"]
    if item["type"] == "value_error":  # such options name the field themselves
        name, separator, rest = item["msg"].removeprefix("Value error, ").partition(": ")
        if separator and name.partition("[")[0] in fields:
            return name, rest
    return path, sentence(item, path, fields)


def _with_tuples(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Make tuples of lists where options want them: YAML has lists only."""
    return {
        name: tuple(value) if isinstance(value, list) and _takes(fields[name], tuple, list) else value
        for name, value in raw.items()
    }


def _takes(annotation: Any, kind: type, rather: type) -> bool:
    """Say whether a field takes values of type ``kind`` and none of type ``rather``."""
    origins: set[Any] = set()
    _collect(annotation, origins.add)
    return kind in origins and rather not in origins


def _collect(annotation: Any, add: Callable[[Any], None]) -> None:
    origin = typing.get_origin(annotation)
    if origin in (tuple, list):
        add(origin)
        return
    for argument in typing.get_args(annotation):
        _collect(argument, add)

"""The base class of every part of a recipe, and how to ask about its fields."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict


class RecipeModel(BaseModel):
    """Base of every part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def is_recipe_model(value: Any) -> bool:
    """Say whether this is a class that the recipe validates: a :class:`RecipeModel` or the options of a method."""
    return isinstance(value, type) and (issubclass(value, RecipeModel) or dataclasses.is_dataclass(value))


def fields_of(section: type) -> dict[str, Any]:
    """Field name -> annotation."""
    if issubclass(section, RecipeModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in getattr(section, "__dataclass_fields__", {}) if name in hints}


def kind_of(section: type) -> str | None:
    """Return what tells a section from its alternatives: its ``kind``, or the ``type`` of a search dimension."""
    fields = fields_of(section)
    names = typing.get_args(fields.get("kind") or fields.get("type"))
    return names[0] if names else None

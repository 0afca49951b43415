"""Every kind of tracking that a recipe may name has an implementation that is one, and is imported only on use."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest

from raymem.recipe.schema import Tracking
from raymem.tracking import KINDS, Tracker
from raymem.tracking.tracker import TrackingResult


def test_the_recipe_knows_the_same_kinds() -> None:
    union = typing.get_args(typing.get_args(Tracking.__value__)[0])
    assert {section.model_fields["kind"].default: section for section in union} == {
        name: kind.options for name, kind in KINDS.items()
    }


def methods(cls: Any) -> dict[str, list[str]]:
    """Public name -> names of its parameters; none for a property."""
    members = inspect.getmembers(cls, lambda member: inspect.isroutine(member) and not inspect.isbuiltin(member))
    return {name: list(inspect.signature(member).parameters) for name, member in members if not name.startswith("_")}


@pytest.mark.parametrize("name", KINDS)
def test_an_implementation_has_what_is_asked_for(name: str) -> None:
    tracker, asked = KINDS[name].load(), methods(Tracker)
    assert {"start", "attach", "check", "spec", "log", "finish"} == set(asked)
    assert {method: parameters for method, parameters in methods(tracker).items() if method in asked} == asked
    result = typing.get_type_hints(tracker.finish)["return"]
    fields = {*dir(result), *getattr(result, "__dataclass_fields__", {})}
    assert {member for member in dir(TrackingResult) if not member.startswith("_")} <= fields

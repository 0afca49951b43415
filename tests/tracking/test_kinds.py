"""Every kind of tracking has an implementation that is one, and is imported only on use."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from typing import Any

import pytest

from raymem.recipe.axes import TRACKERS
from raymem.tracking import Tracker
from raymem.tracking.tracker import TrackingResult


def methods(cls: Any) -> dict[str, list[str]]:
    """Public name -> names of its parameters; none for a property."""
    members = inspect.getmembers(cls, lambda member: inspect.isroutine(member) and not inspect.isbuiltin(member))
    return {name: list(inspect.signature(member).parameters) for name, member in members if not name.startswith("_")}


@pytest.mark.parametrize("name", TRACKERS)
def test_an_implementation_has_what_is_asked_for(name: str) -> None:
    tracker, asked = TRACKERS[name].load(), methods(Tracker)
    assert {"start", "attach", "check", "spec", "log", "finish"} == set(asked)
    assert {method: parameters for method, parameters in methods(tracker).items() if method in asked} == asked
    result = typing.get_type_hints(tracker.finish)["return"]
    fields = {*dir(result), *getattr(result, "__dataclass_fields__", {})}
    assert {member for member in dir(TrackingResult) if not member.startswith("_")} <= fields


def test_reading_a_recipe_imports_no_tracker() -> None:
    program = (
        "import sys; from raymem.recipe.load import recipe_of\n"
        "recipe_of({'name': 'r', 'model': {'name': 'demo'}, 'data': {'train': 'demo:text'}, 'train': {'steps': 1}})\n"
        "print(sorted({'mlflow', 'torch', 'raymem.tracking.mlflow_tracker'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

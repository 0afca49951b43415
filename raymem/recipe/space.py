"""A search space: paths of a recipe, and the values that a sweep may put there.

A space is plain data, in a Python file (``SPACE = {...}``), a YAML file, or the recipe's own ``space`` section:

    adapter.kind:   {type: choice, choices: [lora, moram]}
    adapter.rank:   {type: int, low: 4, high: 64, log: true}
    adapter.density: {type: float, low: 0.005, high: 0.25, log: true, when: {adapter.kind: [moram]}}

A dimension with ``when`` exists only where the recipe so far has one of those values; that makes a space conditional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raymem.recipe.base import RecipeModel

Scalar = str | int | float | bool | None
Point = dict[str, Any]
"""A point: maps the path of every dimension that exists in it to a value."""


class _Conditional(RecipeModel):
    when: dict[str, list[Scalar]] = {}
    """Maps a path to the values of it with which this dimension exists; the paths come earlier in the space, or are the
    recipe's own."""


class _Range(_Conditional):
    @model_validator(mode="after")
    def _ordered(self) -> Any:
        low, high = self.low, self.high  # type: ignore[attr-defined]
        if not low < high:
            raise ValueError(f"low: {low} is not below high: {high}")
        if self.log and low <= 0:  # type: ignore[attr-defined]
            raise ValueError(f"low: {low} has no logarithm; take a positive one, or log: false")
        return self


class FloatDimension(_Range):
    """A real number."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    """Whether values are drawn evenly over orders of magnitude."""

    def grid(self) -> list[Any]:
        """Return both ends and the middle."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return [self.low, middle, self.high]


class IntDimension(_Range):
    """A whole number, ends included."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    """Whether values are drawn evenly over orders of magnitude."""

    def grid(self) -> list[Any]:
        """Return both ends and the middle."""
        middle = round(math.sqrt(self.low * self.high)) if self.log else (self.low + self.high) // 2
        return sorted({self.low, middle, self.high})


class ChoiceDimension(_Conditional):
    """One of a list."""

    type: Literal["choice"]
    choices: Annotated[list[Scalar], Field(min_length=1)]

    def grid(self) -> list[Any]:
        """Return every choice."""
        return list(self.choices)


Dimension = Annotated[FloatDimension | IntDimension | ChoiceDimension, Field(discriminator="type")]
Space = Mapping[str, FloatDimension | IntDimension | ChoiceDimension]
Draw = Callable[[str, FloatDimension | IntDimension | ChoiceDimension], Any]
AXES = ("base", "adapter", "activations", "loss", "optimizer")


def sample(space: Space, recipe: Mapping[str, Any], draw: Draw) -> Point:
    """Go through the dimensions in order and draw a value of each that exists.

    Args:
        recipe: the whole recipe as a plain dict, which ``when`` may also ask about.
        draw: gives the value of a path.
    """
    point: Point = {}
    for path, dimension in space.items():
        if all(_value(recipe, point, asked) in allowed for asked, allowed in dimension.when.items()):
            point[path] = draw(path, dimension)
    return point


def grid(space: Space, recipe: Mapping[str, Any]) -> Iterator[Point]:
    """Yield every point over the values of each dimension's ``grid``; none comes twice."""
    waiting: list[list[Any]] = [[]]
    while waiting:
        begin = waiting.pop()
        others: list[list[Any]] = []
        taken: list[Any] = []

        def draw(
            path: str, dimension: Any, begin: list[Any] = begin, taken: list[Any] = taken, others: Any = others
        ) -> Any:
            if len(taken) < len(begin):
                value = begin[len(taken)]
            else:
                value, *rest = dimension.grid()
                others.extend([*taken, other] for other in rest)
            taken.append(value)
            return value

        yield sample(space, recipe, draw)
        waiting.extend(reversed(others))


def apply(recipe: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """Put a point's values into the recipe, as a plain dict.

    The kinds of axes come first, wherever the point has them. Another kind on an axis starts from that kind's defaults:
    options of the recipe's own kind do not carry over.
    """
    changed = {name: dict(value) if isinstance(value, Mapping) else value for name, value in recipe.items()}
    for path, value in sorted(point.items(), key=lambda item: not _is_kind(item[0])):
        *parents, last = path.split(".")
        if _is_kind(path) and changed[parents[0]]["kind"] != value:
            changed[parents[0]] = {"kind": value}
            continue
        node: dict[str, Any] = changed
        for part in parents:
            inner = node.get(part)
            node[part] = dict(inner) if isinstance(inner, Mapping) else {}
            node = node[part]
        node[last] = value
    return changed


def _is_kind(path: str) -> bool:
    axis, _, last = path.partition(".")
    return axis in AXES and last == "kind"


def _value(recipe: Mapping[str, Any], point: Point, path: str) -> Any:
    node: Any = apply(recipe, point)
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node

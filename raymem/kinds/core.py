"""Defines the base class of the kinds of all axes."""

from __future__ import annotations

import typing
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from raymem.hooks import Hook

OptionsT = TypeVar("OptionsT")


OPTIONS_RULES = {"extra": "forbid", "strict": True, "allow_inf_nan": False, "use_attribute_docstrings": True}
"""The ``__pydantic_config__`` of an options dataclass whose attribute docstrings are to describe its keys."""


@dataclass(frozen=True)
class Rule:
    """Settings that are refused together."""

    settings: tuple[str, ...]
    reason: str
    cure: str
    applies: Callable[[Any], bool]
    """Asked with the recipe."""


@dataclass(frozen=True)
class Advice:
    """A change of a recipe that lowers its peak."""

    override: str
    """The change, as ``--set`` takes it."""
    terms: tuple[str, ...] = ()
    """Memory terms that it lowers (weights, trainable, gradients, optimizer, activations, loss, workspace)."""
    cost: int = 50
    """The cost in time and quality beside others: the cheapest are tried first. 10 changes no result, 90 is a last
    resort."""
    applies: Callable[[Any], bool] = lambda recipe: True
    """Asked with the recipe: whether the change is one, that is, not set already. Combinations that a rule refuses are
    left out anyway."""
    exact: bool = False
    """Whether training gives the same result, up to rounding."""
    time: str = "not known"
    """The cost in time, in words that follow "time:": relative to the step without the change, and why."""
    is_planned: bool = True
    """Whether ``raymem plan --advise`` works it out; a pipeline of its own is only named."""


@dataclass(frozen=True)
class Start:
    """How a new recipe that is made for a kind begins."""

    method: str
    """The name that ``raymem init --method`` knows it by."""
    words: str
    """What it does, in a few words."""
    values: Mapping[str, tuple[Any, str]]
    """Path in the recipe -> a usual value, and in a few words why; ``<axis>.kind`` comes first, and the learning rate
    (``optimizer.lr``) is among them."""


class Kind(ABC, Generic[OptionsT]):
    """One choice of an axis."""

    options: ClassVar[type]
    """Frozen dataclass of its options. Its field ``kind: Literal[name] = name`` names the kind, its docstring describes
    it in the recipe reference, and a ``ValueError("field: what is wrong")`` of it becomes an error of the recipe."""
    free: ClassVar[tuple[str, ...]] = ()
    """Options that take no memory, so that plans are shared between their values."""
    exact: ClassVar[tuple[str, ...]] = ()
    """Options that change no result: a run may go on with other values of them."""
    grows: ClassVar[tuple[str, ...]] = ()
    """Options of which more never takes less memory: a larger value of one that did not fit is refused at once."""
    paths: ClassVar[tuple[str, ...]] = ()
    """Options that hold a path, which is made absolute where the command is started."""
    paths_or_ids: ClassVar[tuple[str, ...]] = ()
    """Options that hold a path or a Hugging Face id."""
    nested: ClassVar[tuple[str, ...]] = ()
    """Options that hold a list of options of the same axis."""
    start: ClassVar[Start | None] = None
    """Usual values of a recipe for it, where it is a method that a person chooses."""
    space: ClassVar[Mapping[str, Any]] = {}
    """Search space over its options, which ``raymem sweep --space <kind>`` takes: path -> dimension."""

    @property
    def name(self) -> str:
        """The kind as recipes write it."""
        name: str = typing.get_args(typing.get_type_hints(self.options)["kind"])[0]
        return name

    def rules(self) -> Sequence[Rule]:
        """Return rules about settings that do not go with it."""
        return ()

    def advice(self) -> Sequence[Advice]:
        """Return changes towards this kind, or of its options, that make a recipe smaller."""
        return ()

    def hooks(self, options: OptionsT, model: Any, seed: int) -> Sequence[Hook]:
        """Return the hooks by which it takes part in a run beyond the model that it builds.

        Args:
            model: complete, as it is trained.
        """
        return ()

"""The axes of a recipe as registries: which kinds there are, and the object that stands for each.

Built-in kinds are listed here as ``module:class`` and imported on use, so that reading a recipe loads no
method that it does not name. Others come from outside, by :func:`register_adapter` and its like or as entry points of
the group ``raymem.<axis>`` (``raymem.adapters``, ...), and are used in the same way everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from raymem.errors import RecipeError
from raymem.kinds import ActivationsKind, AdapterKind, BaseKind, Kind, LossKind, OptimizerKind, TrackerKind

KindT = TypeVar("KindT", bound=Kind[Any])


class Axis(Generic[KindT]):
    """The kinds of one axis, by name.

    Args:
        name: section of the recipe.
        group: entry points of others' kinds.
        base: class that a kind extends.
        default: kind of options that name none.
        initial: kind of a recipe that says nothing of the axis.
        builtin: name -> ``module:class``.
    """

    def __init__(
        self, name: str, group: str, base: type, *, default: str, initial: str, builtin: Mapping[str, str]
    ) -> None:
        self.name, self.group, self.default, self.initial = name, group, default, initial
        self._base = base
        self.builtin = dict(builtin)
        self._outside: dict[str, str] = {}
        self._kinds: dict[str, KindT] = {}
        self._entry_points_read = False

    def __iter__(self) -> Iterator[str]:
        """List the names of all kinds, raymem's own first."""
        self._read_entry_points()
        return iter([*self.builtin, *self._outside])

    def __contains__(self, name: object) -> bool:
        return name in self.builtin or name in list(self)

    def __getitem__(self, name: str) -> KindT:
        """The kind of that name.

        Raises:
            RecipeError: there is none, or a registered one cannot be imported.
        """
        if name not in self._kinds:
            if name not in self:
                raise RecipeError(f"{self.name}.kind: {name!r} is not registered; known are {', '.join(self)}")
            self._kinds[name] = self._load({**self.builtin, **self._outside}[name])
        return self._kinds[name]

    def kinds(self) -> list[KindT]:
        """Return every kind of the axis, and imports their rooms for it."""
        return [self[name] for name in self]

    def of(self, recipe: Any) -> KindT:
        """Return the kind that a recipe has chosen."""
        return self[getattr(recipe, self.name).kind]

    def initial_options(self) -> Any:
        """Return the options that a recipe has if it says nothing of the axis."""
        return self[self.initial].options()

    def spelled_out(self, value: Any) -> Any:
        """Turn a kind's name alone, options without a kind, or an options object into a mapping with its kind."""
        if isinstance(value, str):
            return {"kind": value}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        return {"kind": self.default, **value} if isinstance(value, Mapping) else value

    def register(self, kind: type[KindT] | str) -> None:
        """Add a kind from outside raymem.

        Args:
            kind: its class, at the top of an importable module, or ``module:class``.

        Raises:
            RecipeError: no such class, the name of another kind, or a class that workers could not import.
        """
        class_path = kind if isinstance(kind, str) else f"{kind.__module__}:{kind.__qualname__}"
        module, _, attribute = class_path.partition(":")
        if module == "__main__" or "<" in attribute:
            raise RecipeError(
                f"{self.name}: {attribute} is defined where other processes cannot import it; put it at the top of a "
                "module that is installed or on PYTHONPATH"
            )
        loaded = self._load(class_path)
        if self._outside.get(loaded.name, class_path) != class_path or loaded.name in self.builtin:
            raise RecipeError(
                f"{self.name}: {class_path} is to be named {loaded.name!r}, which is another kind already; choose "
                "another name for its options' field kind"
            )
        self._outside[loaded.name] = class_path
        self._kinds[loaded.name] = loaded

    def unregister(self, name: str) -> None:
        """Forget a kind that :meth:`register` added."""
        del self._outside[name]
        del self._kinds[name]

    def outside(self) -> list[str]:
        """Name every kind that is not raymem's own as ``module:class``."""
        self._read_entry_points()
        return list(self._outside.values())

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        self._entry_points_read = True
        for point in importlib.metadata.entry_points(group=self.group):
            if point.name in self.builtin:
                raise RecipeError(
                    f"{self.name}: the entry point {point.name} = {point.value} of {_distribution(point)} has the name "
                    "of a kind of raymem; uninstall that package, or let its author rename it"
                )
            self._outside.setdefault(point.name, point.value)

    def _load(self, class_path: str) -> KindT:
        module, _, attribute = class_path.partition(":")
        try:
            loaded_object: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
            kind: Any = loaded_object() if isinstance(loaded_object, type) else loaded_object
        except Exception as error:  # others' code may raise anything
            raise RecipeError(
                f"{self.name}: the kind {class_path} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(kind, self._base):
            raise RecipeError(
                f"{self.name}: {class_path} is no {self._base.__name__}; extend raymem.kinds.{self._base.__name__}"
            )
        _check_options(typing.cast(KindT, kind), f"{self.name}: {class_path}")
        return typing.cast(KindT, kind)


def _check_options(kind: Kind[Any], where: str) -> None:
    options = getattr(kind, "options", None)
    rule = "a frozen dataclass with a default for every field, and a field `kind: Literal['name'] = 'name'`"
    if not (isinstance(options, type) and dataclasses.is_dataclass(options) and "kind" in options.__dataclass_fields__):
        raise RecipeError(f"{where}: its `options` must be {rule}")
    names = typing.get_args(typing.get_type_hints(options)["kind"])
    if len(names) != 1 or options.__dataclass_fields__["kind"].default != names[0]:
        raise RecipeError(f"{where}: its options' field kind must be `kind: Literal['name'] = 'name'`")


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an installed package"


_M = "raymem.methods"
BASES: Axis[BaseKind[Any]] = Axis(
    "base", "raymem.bases", BaseKind, default="full", initial="full",
    builtin={"full": f"{_M}.plain.bases:FullBaseKind", "loram": f"{_M}.loram.kind:LoRAMKind"},
)  # fmt: skip
ADAPTERS: Axis[AdapterKind[Any]] = Axis(
    "adapter", "raymem.adapters", AdapterKind, default="lora", initial="lora",
    builtin={
        "none": f"{_M}.plain.adapters:FullTrainingKind",
        "lora": f"{_M}.lora.kind:LoraKind",
        "moram": f"{_M}.moram.kind:MoRAMKind",
    },
)  # fmt: skip
ACTIVATIONS: Axis[ActivationsKind[Any]] = Axis(
    "activations", "raymem.activations", ActivationsKind, default="none", initial="none",
    builtin={
        "none": f"{_M}.plain.activations:KeepAllKind",
        "checkpoint": f"{_M}.plain.activations:CheckpointKind",
        "loract": f"{_M}.loract.kind:LoRActKind",
    },
)  # fmt: skip
LOSSES: Axis[LossKind[Any]] = Axis(
    "loss", "raymem.losses", LossKind, default="auto", initial="auto",
    builtin={
        "auto": f"{_M}.chunked_loss.kind:AutoLossKind",
        "chunked": f"{_M}.chunked_loss.kind:ChunkedLossKind",
        "full": f"{_M}.plain.losses:FullLossKind",
    },
)  # fmt: skip
OPTIMIZERS: Axis[OptimizerKind[Any]] = Axis(
    "optimizer", "raymem.optimizers", OptimizerKind, default="adamw", initial="adamw",
    builtin={
        "adamw": f"{_M}.plain.optimizers:AdamWKind",
        "mlorc_adamw": f"{_M}.mlorc.kind:MLorcAdamWKind",
        "mlorc_lion": f"{_M}.mlorc.kind:MLorcLionKind",
    },
)  # fmt: skip

TRACKERS: Axis[TrackerKind[Any]] = Axis(
    "tracking", "raymem.trackers", TrackerKind, default="mlflow", initial="mlflow",
    builtin={
        "mlflow": "raymem.tracking.mlflow_kind:MlflowKind",
        "none": "raymem.tracking.none_kind:NoTrackingKind",
    },
)  # fmt: skip

MEMORY_AXES: dict[str, Axis[Any]] = {axis.name: axis for axis in (BASES, ADAPTERS, ACTIVATIONS, LOSSES, OPTIMIZERS)}
"""Maps each section of the recipe that attacks a memory term to its registry."""
AXES: dict[str, Axis[Any]] = {**MEMORY_AXES, TRACKERS.name: TRACKERS}
"""Maps each section of the recipe that is an axis to its registry."""


def chosen(recipe: Any) -> list[Kind[Any]]:
    """Return the kinds that a recipe has chosen, axis by axis."""
    return [axis.of(recipe) for axis in AXES.values()]


def all_kinds() -> Iterable[Kind[Any]]:
    """Yield every kind of every axis."""
    for axis in AXES.values():
        yield from axis.kinds()


@contextlib.contextmanager
def building(config: Any) -> Iterator[None]:
    """Let transformers build models of ``config`` in the block, whichever kind of base has changed their layers."""
    with contextlib.ExitStack() as stack:
        for kind in BASES.kinds():
            stack.enter_context(kind.building(config))
        yield


def why_not_of_model(directory: Path) -> str | None:
    """Say why an adapter does not go with the model that it names, and what to do; return None if it does."""
    return next((why for kind in BASES.kinds() if (why := kind.why_not_of_model(directory)) is not None), None)


def full_base() -> Any:
    """Return the options of the base that is the recipe's own model, whole and unquantised."""
    return BASES["full"].options()


def no_adapter() -> Any:
    """Return the options of the adapter axis for a whole model."""
    return ADAPTERS["none"].options()


def registered() -> dict[str, list[str]]:
    """Map each axis to ``module:class`` of others' kinds, for :func:`register_again` in another process."""
    return {name: axis.outside() for name, axis in AXES.items() if axis.outside()}


def register_again(kinds: Mapping[str, Iterable[str]]) -> None:
    """Register what :func:`registered` named in the process that sent it."""
    for name, class_paths in kinds.items():
        for class_path in class_paths:
            AXES[name].register(class_path)


def outside_code(recipe: Any) -> str | None:
    """Digest the modules of a recipe's kinds from outside raymem that decide its memory; None if there are none."""
    digest, any_outside = hashlib.sha256(), False
    for kind in (axis.of(recipe) for axis in MEMORY_AXES.values()):
        module = sys.modules[type(kind).__module__]
        if module.__name__.partition(".")[0] != "raymem":
            any_outside = True
            digest.update(Path(inspect.getfile(module)).read_bytes())
    return digest.hexdigest() if any_outside else None


def register_base(kind: type[BaseKind[Any]] | str) -> None:
    """Add a kind of ``base``; see :meth:`Axis.register`."""
    BASES.register(kind)


def register_adapter(kind: type[AdapterKind[Any]] | str) -> None:
    """Add a kind of ``adapter``; see :meth:`Axis.register`."""
    ADAPTERS.register(kind)


def register_activations(kind: type[ActivationsKind[Any]] | str) -> None:
    """Add a kind of ``activations``; see :meth:`Axis.register`."""
    ACTIVATIONS.register(kind)


def register_loss(kind: type[LossKind[Any]] | str) -> None:
    """Add a kind of ``loss``; see :meth:`Axis.register`."""
    LOSSES.register(kind)


def register_optimizer(kind: type[OptimizerKind[Any]] | str) -> None:
    """Add a kind of ``optimizer``; see :meth:`Axis.register`."""
    OPTIMIZERS.register(kind)


def register_tracker(kind: type[TrackerKind[Any]] | str) -> None:
    """Add a kind of ``tracking``; see :meth:`Axis.register`."""
    TRACKERS.register(kind)

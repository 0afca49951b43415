"""The axes of a recipe as registries: which kinds there are, and the object that stands for each.

Built-in kinds are listed here by the place of their class and imported on use, so that reading a recipe loads no
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

from pydantic import PydanticUserError, TypeAdapter

from raymem.errors import RecipeError
from raymem.kinds import ActivationsKind, AdapterKind, BaseKind, Kind, LossKind, OptimizerKind, Start, TrackerKind

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
        several: kind that a list of kinds is short for; its first nested option holds them.
    """

    def __init__(
        self, name: str, group: str, base: type, *, default: str, initial: str, builtin: Mapping[str, str],
        several: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.group, self.default, self.initial, self.several = name, group, default, initial, several
        self._base = base
        self.builtin = dict(builtin)
        self._outside: dict[str, str] = {}
        self._kinds: dict[str, KindT] = {}
        self._unusable: dict[str, str] = {}
        self._entry_points_read = False

    def __iter__(self) -> Iterator[str]:
        """Return names of all kinds, raymem's own first."""
        self._read_entry_points()
        return iter([*self.builtin, *self._outside])

    def __contains__(self, name: object) -> bool:
        return name in self.builtin or name in list(self)

    def __getitem__(self, name: str) -> KindT:
        """Return the kind of that name.

        Raises:
            RecipeError: there is none, or one of others cannot be imported, is none, or has another name.
        """
        if name not in self._kinds:
            if name not in self:
                raise RecipeError(f"{self.name}.kind: {name!r} is not registered; known are {', '.join(self)}")
            if name not in self.builtin and name in self._unusable:
                raise RecipeError(self._unusable[name])
            kind = self._load({**self.builtin, **self._outside}[name])
            if kind.name != name:
                raise RecipeError(
                    f"{self.name}: {self._outside[name]} is registered as {name!r}, but its options call it "
                    f"{kind.name!r}; let its author give both the same name"
                )
            self._kinds[name] = kind
        return self._kinds[name]

    def kinds(self) -> list[KindT]:
        """Return all that can be used; imports their rooms. What is wrong with others, :meth:`problems` says."""
        usable = []
        for name in self:
            with contextlib.suppress(RecipeError):
                usable.append(self[name])
        return usable

    def problems(self) -> list[str]:
        """Return a sentence for each kind of others that cannot be used; it concerns recipes that name it."""
        sentences = {}
        for name in self:
            try:
                self[name]
            except RecipeError as error:
                sentences[name] = str(error)
        return list({**sentences, **self._unusable}.values())

    def of(self, recipe: Any) -> KindT:
        """Return the kind that a recipe has chosen."""
        return self[getattr(recipe, self.name).kind]

    def initial_options(self) -> Any:
        """Return options of a recipe that says nothing of the axis."""
        return self[self.initial].options()

    def spelled_out(self, value: Any) -> Any:
        """Return a kind's bare name, options without a kind, an options object, or a list of them where the axis takes
        one, as a mapping with its kind.
        """
        if isinstance(value, str):
            return {"kind": value}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        if isinstance(value, list) and self.several is not None:
            return {"kind": self.several, self.list_option: value}
        return {"kind": self.default, **value} if isinstance(value, Mapping) else value

    @property
    def list_option(self) -> str:
        """The option that holds a list of kinds."""
        assert self.several is not None
        return self[self.several].nested[0]

    def register(self, kind: type[KindT] | str) -> None:
        """Add a kind of others.

        Args:
            kind: its class, at the top of an importable module, or ``module:class``.

        Raises:
            RecipeError: no such class, the name of another kind, or a class that workers could not import.
        """
        self._read_entry_points()
        place = kind if isinstance(kind, str) else f"{kind.__module__}:{kind.__qualname__}"
        module, _, attribute = place.partition(":")
        if module == "__main__" or "<" in attribute:
            raise RecipeError(
                f"{self.name}: {attribute} is defined where other processes cannot import it; put it at the top of a "
                "module that is installed or on PYTHONPATH"
            )
        loaded = self._load(place)
        if self._outside.get(loaded.name, place) != place or loaded.name in self.builtin:
            raise RecipeError(
                f"{self.name}: {place} is to be named {loaded.name!r}, which is another kind already; choose another "
                "name for its options' field kind"
            )
        self._outside[loaded.name] = place
        self._kinds[loaded.name] = loaded

    def unregister(self, name: str) -> None:
        """Forget a kind that :meth:`register` added."""
        del self._outside[name]
        self._kinds.pop(name, None)

    def outside(self) -> dict[str, str]:
        """Name -> ``module:class`` of every kind that is not raymem's own."""
        self._read_entry_points()
        return dict(self._outside)

    def take_over(self, outside: Mapping[str, str]) -> None:
        """Know the kinds that :meth:`outside` gave in another process; each is imported when a recipe names it."""
        self._read_entry_points()
        for name, place in outside.items():
            if self._outside.get(name) != place:
                self._kinds.pop(name, None)
            self._outside[name] = place

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        self._entry_points_read = True
        by_name: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
        for point in importlib.metadata.entry_points(group=self.group):
            by_name.setdefault(point.name, {}).setdefault(point.value, point)
        for name, points in by_name.items():
            first, *others = points.values()
            if name in self.builtin:
                self._unusable[name] = (
                    f"{self.name}: the entry point {name} = {first.value} of {_distribution(first)} has the name of a "
                    "kind of raymem, which is used instead; uninstall that package, or let its author rename it"
                )
                continue
            if others:
                self._unusable[name] = (
                    f"{self.name}: {_distribution(first)} and {_distribution(others[0])} both bring a kind named "
                    f"{name!r}; uninstall one of them, or let its author rename it"
                )
            self._outside[name] = first.value

    def _load(self, place: str) -> KindT:
        module, _, attribute = place.partition(":")
        try:
            found: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
            kind: Any = found() if isinstance(found, type) else found
        except Exception as error:  # others' code may raise anything
            raise RecipeError(
                f"{self.name}: the kind {place} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(kind, self._base):
            raise RecipeError(
                f"{self.name}: {place} is no {self._base.__name__}; extend raymem.kinds.{self._base.__name__}"
            )
        _check_options(typing.cast(KindT, kind), f"{self.name}: {place}")
        return typing.cast(KindT, kind)


def _check_options(kind: Kind[Any], place: str) -> None:
    options = getattr(kind, "options", None)
    rule = "a frozen dataclass with a default for every field, and a field `kind: Literal['name'] = 'name'`"
    if not (isinstance(options, type) and dataclasses.is_dataclass(options) and "kind" in options.__dataclass_fields__):
        raise RecipeError(f"{place}: its `options` must be {rule}")
    made = (dataclasses.MISSING, dataclasses.MISSING)
    without = [f.name for f in dataclasses.fields(options) if (f.default, f.default_factory) == made]
    if without or not options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        problem = f"{without[0]} has no default" if without else "it is not frozen"
        raise RecipeError(f"{place}: its `options` must be {rule}; {problem}")
    try:
        names = typing.get_args(typing.get_type_hints(options)["kind"])
    except (NameError, TypeError) as error:
        raise RecipeError(f"{place}: the annotations of its options cannot be read: {error}") from None
    try:
        TypeAdapter(options).json_schema()
    except PydanticUserError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise RecipeError(f"{place}: its options have a type that no recipe can hold: {reason}") from None
    if len(names) != 1 or options.__dataclass_fields__["kind"].default != names[0]:
        raise RecipeError(f"{place}: its options' field kind must be `kind: Literal['name'] = 'name'`")


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
        "offload": f"{_M}.offload.kind:OffloadKind",
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
        "adamw_8bit": f"{_M}.adam8bit.kind:AdamW8bitKind",
        "mlorc_adamw": f"{_M}.mlorc.kind:MLorcAdamWKind",
        "mlorc_lion": f"{_M}.mlorc.kind:MLorcLionKind",
    },
)  # fmt: skip

TRACKERS: Axis[TrackerKind[Any]] = Axis(
    "tracking", "raymem.trackers", TrackerKind, default="mlflow", initial="mlflow", several="several",
    builtin={
        "mlflow": "raymem.tracking.mlflow.kind:MlflowKind",
        "tensorboard": "raymem.tracking.tensorboard_kind:TensorBoardKind",
        "wandb": "raymem.tracking.wandb_kind:WandbKind",
        "several": "raymem.tracking.several_kind:SeveralKind",
        "none": "raymem.tracking.none_kind:NoTrackingKind",
    },
)  # fmt: skip

MEMORY_AXES: dict[str, Axis[Any]] = {axis.name: axis for axis in (BASES, ADAPTERS, ACTIVATIONS, LOSSES, OPTIMIZERS)}
"""Section of the recipe that attacks a memory term -> its registry."""
AXES: dict[str, Axis[Any]] = {**MEMORY_AXES, TRACKERS.name: TRACKERS}
"""Section of the recipe -> its registry."""


def chosen(recipe: Any) -> list[Kind[Any]]:
    """Return the kinds that a recipe has chosen, axis by axis."""
    return [axis.of(recipe) for axis in AXES.values()]


def all_kinds() -> Iterable[Kind[Any]]:
    """Return every kind of every axis that can be used."""
    for axis in AXES.values():
        yield from axis.kinds()


def starts() -> dict[str, Start]:
    """Return the methods that a new recipe can be made for, by name; the usual one comes first."""
    usual = ADAPTERS[ADAPTERS.initial].start
    kinds = (kind.start for axis in MEMORY_AXES.values() for kind in axis.kinds())
    return {start.method: start for start in (usual, *kinds) if start is not None}


@contextlib.contextmanager
def building(config: Any) -> Iterator[None]:
    """Inside, transformers builds models of ``config``, whichever kind of base has changed their layers."""
    with contextlib.ExitStack() as stack:
        for kind in BASES.kinds():
            stack.enter_context(kind.building(config))
        yield


def why_not_of_model(directory: Path) -> str | None:
    """Say why an adapter does not go with the model that it names, and what to do; None if it does."""
    return next((why for kind in BASES.kinds() if (why := kind.why_not_of_model(directory)) is not None), None)


def full_base() -> Any:
    """Return options of the base that is the recipe's own model, whole and unquantised."""
    return BASES["full"].options()


def no_adapter() -> Any:
    """Return options of the adapter axis for a whole model."""
    return ADAPTERS["none"].options()


def registered() -> dict[str, dict[str, str]]:
    """Return axis -> name -> ``module:class`` of others' kinds, for :func:`register_again` in another process."""
    return {name: axis.outside() for name, axis in AXES.items() if axis.outside()}


def register_again(kinds: Mapping[str, Mapping[str, str]]) -> None:
    """Know what :func:`registered` named in the process that sent it."""
    for name, outside in kinds.items():
        AXES[name].take_over(outside)


def problems() -> list[str]:
    """Return a sentence for each kind of others, of whichever axis, that cannot be used."""
    return [sentence for axis in AXES.values() for sentence in axis.problems()]


def outside_code(recipe: Any) -> str | None:
    """Digest of the code of a recipe's kinds, not raymem's own, that decide its memory; None if there are none.

    A module at the top counts alone; one of a package with all that lies beside and below it.
    """
    digest, any_outside = hashlib.sha256(), False
    for kind in (axis.of(recipe) for axis in MEMORY_AXES.values()):
        module = sys.modules[type(kind).__module__]
        if module.__name__.partition(".")[0] == "raymem":
            continue
        any_outside = True
        file = Path(inspect.getfile(module))
        for source in sorted(file.parent.rglob("*.py")) if module.__package__ else [file]:
            digest.update(source.read_bytes())
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

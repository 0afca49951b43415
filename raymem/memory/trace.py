"""Records every storage that a program allocates and frees, below autograd, for fake tensors and real ones alike.

A dispatch mode sees the outputs of every operation; their storages are followed until Python lets go of them. What an
operation allocates and frees within its kernel is invisible here: a table given by the caller says how much that is
(:mod:`raymem.memory.devices`).

Categories are kept with the storage, not with the event, so that what turns out to be a gradient or optimizer state
counts as that from its birth.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from raymem.memory.nf4 import STANDS_FOR
from raymem.private_apis import (
    FakeTensor,
    TorchDispatchMode,
    active_fake_mode,
    in_backward,
    is_traceable_wrapper_subclass,
)

Category = Literal["weights", "trainable", "gradients", "optimizer", "activations", "loss", "workspace"]
CATEGORIES: tuple[Category, ...] = (
    "weights", "trainable", "gradients", "optimizer", "activations", "loss", "workspace",
)  # fmt: skip
"""Frozen weights and buffers; trained weights and their fp32 masters; gradients; optimizer state; what a forward pass
(or its repetition in backward) makes; logits and all that is made of them; and temporaries of backward and update."""

Phase = Literal["load", "before_step", "forward", "backward", "step", "evaluation", "save"]
PHASES: tuple[Phase, ...] = ("load", "before_step", "forward", "backward", "step", "evaluation", "save")
"""``before_step``: what hooks do (:mod:`raymem.hooks`); ``step``: norm, clipping and update."""

Workspace = Callable[[Any, tuple[Any, ...], Any], int]
"""Given an operation, its positional arguments and its result: bytes that its kernel allocates and frees inside."""


Call = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""A function that runs an operation."""

_DEVICE = torch.ops.prim.device.default


@dataclass(eq=False, slots=True)
class Record:
    """A storage that was recorded."""

    key: int
    num_bytes: int
    category: Category
    name: str
    """Parameter or state it belongs to, or the module that was running when it was made."""
    operation: str
    on_host: bool = False
    """Whether it lies in the memory of the host; on a CPU that is the memory of the device."""


@dataclass(frozen=True, slots=True)
class Change:
    """A storage that appeared (+bytes) or went (-bytes)."""

    record: Record
    num_bytes: int
    phase: Phase
    step: int


class LimitPassed(Exception):
    """Raised when more is alive than a limit."""

    def __init__(self, num_bytes: int, phase: Phase) -> None:
        super().__init__(f"{num_bytes} bytes are alive at once ({phase})")
        self.num_bytes, self.phase = num_bytes, phase
        """The phase in which that happened, and the peak of it so far."""


class Tracer(TorchDispatchMode):
    """Context manager that records what runs inside it.

    Args:
        workspace: what operations use inside their kernels; by default nothing.
        call: runs an operation; by default it is simply called.
        host_is_device: whether what lies on the host counts against ``limit_bytes``, as it does on a CPU.

    ``phase`` and ``step`` are set by the caller; within a backward pass the phase is always ``backward``. If
    ``limit_bytes`` is set and the peak of a phase is above it, the first allocation after that phase raises
    :class:`LimitPassed`. A backward pass only shrinks from there, so in it the first allocation below the limit does.
    """

    def __init__(
        self, workspace: Workspace | None = None, call: Call | None = None, *, host_is_device: bool = True
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._host_is_device = host_is_device
        self._call = call or _plain_call
        self.changes: list[Change] = []
        self.phase: Phase = "load"
        self.step = 0
        self.limit_bytes: int | None = None
        self._alive_bytes = 0
        self._passed: tuple[tuple[int, Phase, bool], int] | None = None
        """Where the limit was passed (step, phase, whether in backward), and the most that was alive there."""
        self._workspace = workspace
        self._live: dict[int, tuple[Record, weakref.ref[Any]]] = {}
        self._next_key = 0
        self._modules: list[str] = []
        self._fake_mode: Any = None
        self._distributed = False
        self._resize: Any = None
        self.attributed: Category | None = None
        self.on_host = False

    def __enter__(self) -> Tracer:
        _active.append(self)

        self._fake_mode = active_fake_mode()
        self._distributed = dist.is_initialized()
        # FSDP2 frees and restores gathered weights by resizing their storage, which no dispatch mode sees.
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> None:
            resize(storage, size)
            self._resized(storage)

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        _active.remove(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No guard against compilation around every operation: it takes a fifth of a trace, and nothing compiles."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # two of three calls are this question
            if type(args[0]) is FakeTensor:
                return args[0].fake_device
            return self._call(func, args, kwargs or {})
        if DTensor in types:
            return NotImplemented  # its local operations come by on their own
        if self._is_shape_arithmetic():
            return func(*args, **(kwargs or {}))
        result = self._call(func, args, kwargs or {})
        operation = func._schema.name
        operation = STANDS_FOR.get(operation, operation)
        for tensor in _tensors(result):
            self._see(tensor, operation)
        if self._workspace is not None:
            used = self._workspace(func, args, result)
            if used > 0:
                self.passing(used, operation)
        return result

    def adopt(self, tensor: torch.Tensor | None, category: Category, name: str) -> None:
        """Say what a tensor is; one that was never seen counts from now on."""
        if tensor is None:
            return
        for storage in _storages(tensor):
            live = self._live.get(storage._cdata)
            if live is None:
                self._add(storage, category, name, "")
            else:
                live[0].category, live[0].name = category, name

    def is_apart(self, tensor: torch.Tensor) -> bool:
        """Say whether a tensor lies on the host while the device has a memory of its own."""
        records = (self._live.get(storage._cdata) for storage in _storages(tensor))
        return not self._host_is_device and any(live is not None and live[0].on_host for live in records)

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Name storages by the module of ``model`` that is running when they are made; undone by the handles."""
        names = {id(module): name for name, module in model.named_modules()}

        def enter(module: nn.Module, inputs: Any) -> None:
            self._modules.append(names.get(id(module), ""))

        def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self._modules.pop()

        return [
            torch.nn.modules.module.register_module_forward_pre_hook(enter),
            torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]

    def _is_shape_arithmetic(self) -> bool:
        """Say whether a distributed tensor is working out shapes, on fake tensors of its own, which take no memory."""
        if not self._distributed:
            return False
        return active_fake_mode() is not self._fake_mode

    def _now(self) -> Phase:
        return "backward" if self.phase == "forward" and in_backward() else self.phase

    def _category(self, phase: Phase) -> Category:
        if self.attributed is not None:
            return self.attributed
        if phase in ("forward", "evaluation", "before_step"):
            return "activations"
        # What checkpointing computes again within backward runs with gradients on, or within modules; backward itself
        # never does.
        again = phase == "backward" and (torch.is_grad_enabled() or bool(self._modules))
        return "activations" if again else "workspace"

    def _see(self, tensor: torch.Tensor, operation: str) -> None:
        for storage in _storages(tensor):
            if storage._cdata not in self._live:
                category = self._category(self._now())
                self._add(storage, category, self._modules[-1] if self._modules else "", operation)

    def _add(self, storage: Any, category: Category, name: str, operation: str) -> None:
        key = storage._cdata
        record = Record(self._next_key, storage.nbytes(), category, name, operation, self.on_host)
        self._next_key += 1
        self._live[key] = (record, weakref.ref(storage, lambda _: self._gone(key, record)))
        self._note(record, record.num_bytes)

    def _gone(self, key: int, record: Record) -> None:
        live = self._live.get(key)
        if live is not None and live[0] is record:
            del self._live[key]
        self._note(record, -record.num_bytes)

    def _resized(self, storage: Any) -> None:
        live = self._live.get(storage._cdata)
        if live is None or live[0].num_bytes == storage.nbytes():
            return
        record = live[0]
        self._note(record, -record.num_bytes)
        record.num_bytes = storage.nbytes()
        self._note(record, record.num_bytes)

    def passing(self, num_bytes: int, operation: str) -> None:
        """Note memory that is allocated and freed at once, and that no operation shows."""
        record = Record(self._next_key, num_bytes, "workspace", self._modules[-1] if self._modules else "", operation)
        self._next_key += 1
        self._note(record, num_bytes)
        self._note(record, -num_bytes)

    def _note(self, record: Record, num_bytes: int) -> None:
        if not num_bytes:
            return
        phase = self._now()
        self.changes.append(Change(record, num_bytes, phase, self.step))
        if record.on_host and not self._host_is_device:
            return
        self._alive_bytes += num_bytes
        if num_bytes > 0 and self.limit_bytes is not None:  # nothing can be raised where a storage goes
            self._hold_to(self.limit_bytes, phase)

    def _hold_to(self, limit_bytes: int, phase: Phase) -> None:
        above, backward = self._alive_bytes > limit_bytes, in_backward()
        where = (self.step, phase, backward)
        if self._passed is not None:
            passed_at, highest = self._passed
            if passed_at != where or (backward and not above):
                raise LimitPassed(highest, passed_at[1])
            self._passed = (where, max(highest, self._alive_bytes))
        elif above:
            self._passed = (where, self._alive_bytes)


_active: list[Tracer] = []


def attribute(category: Category | None) -> None:
    """Say what storages are that are made from now on, where a program is recorded; None leaves it to the phase."""
    for tracer in _active:
        tracer.attributed = category


@contextlib.contextmanager
def attributed(category: Category) -> Iterator[None]:
    """Apply :func:`attribute` in the block; afterwards everything is as before."""
    before = _active[-1].attributed if _active else None
    attribute(category)
    try:
        yield
    finally:
        attribute(before)


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Let storages that are made in the block lie in the memory of the host, where a program is recorded."""
    before = [tracer.on_host for tracer in _active]
    for tracer in _active:
        tracer.on_host = True
    try:
        yield
    finally:
        for tracer, value in zip(_active, before, strict=True):
            tracer.on_host = value


def note_passing(num_bytes: int, operation: str) -> None:
    """Apply :meth:`Tracer.passing`, where a program is recorded."""
    for tracer in _active:
        tracer.passing(num_bytes, operation)


def attribute_backward(category: Category, *, since: torch.Tensor, until: torch.Tensor) -> None:
    """Apply it to backward passes: from the gradient of ``since`` on, until that of ``until`` is there."""
    if not (_active and since.requires_grad and until.requires_grad):
        return
    since.register_hook(lambda _: attribute(category))  # type: ignore[no-untyped-call]
    until.register_hook(lambda _: attribute(None))  # type: ignore[no-untyped-call]


def _plain_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _storages(tensor: torch.Tensor) -> Iterator[Any]:
    """Yield the storages behind a tensor; those of its parts, if it is made of others."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
        return
    try:
        yield tensor.untyped_storage()
    except NotImplementedError:  # sparse layouts have none
        return


@dataclass(frozen=True)
class Live:
    """A storage that is alive at a peak."""

    name: str
    category: Category
    operation: str
    num_bytes: int


@dataclass(frozen=True)
class PeakOf:
    """The highest sum within some changes, and its parts."""

    num_bytes: int
    by_category: dict[Category, int]
    phase: Phase
    at: int
    """The index of the change that reaches it."""


def peak_of(changes: Iterable[Change], *, wanted: Callable[[Change], bool]) -> PeakOf:
    """Return the peak over the changes for which ``wanted`` is true; the others only change what is alive."""
    changes = list(changes)
    total, highest, at = 0, 0, -1
    for index, change in enumerate(changes):
        total += change.num_bytes
        if total > highest and wanted(change):
            highest, at = total, index
    sums: Counter[Category] = Counter()
    for change in changes[: at + 1]:
        sums[change.record.category] += change.num_bytes
    return PeakOf(highest, dict(sums), "load" if at < 0 else changes[at].phase, at)


def live_at(changes: list[Change], at: int) -> list[Live]:
    """List everything that is alive after the change with index ``at``, largest first."""
    alive: dict[int, tuple[Record, int]] = {}
    for change in changes[: at + 1]:
        if change.num_bytes > 0:
            alive[change.record.key] = (change.record, change.num_bytes)
        else:
            alive.pop(change.record.key, None)
    holders = [Live(r.name, r.category, r.operation, size) for r, size in alive.values()]
    return sorted(holders, key=lambda live: (-live.num_bytes, live.name))

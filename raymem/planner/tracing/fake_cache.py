"""Remembers results of operations on fake tensors by geometry.

FakeTensorMode has such a cache itself; of the quarter of a millisecond that an operation costs there, most goes into
its keys. A step repeats the same few hundred geometries in every layer, so a narrow key pays: what is not plain (values
behind a tensor, changes of geometry, outputs that are neither fresh nor a view of one input nor one of the inputs
itself) is left to FakeTensorMode.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from raymem.private_apis import FakeTensor, FakeTensorMode, refuse_data_pointer, without_dispatch


class _Output(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    view_of: int | None
    """Its position among the tensors of the arguments."""
    same_as: int | None = None
    """The position of the argument that it is, as in a write in place."""


class _Known(NamedTuple):
    kind: type
    """The type of the result: one tensor, a tuple or list of them, or None."""
    outputs: tuple[_Output, ...]


_CHANGES_GEOMETRY = ("set_", "resize", "t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "detach_")
_LIBRARIES = ("aten", "raymem")
"""The libraries whose operations do what their schema says."""
_PLAIN = (int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


class OutputCache:
    """Runs operations on the fake tensors of one mode.

    What is known outlives a session: a process that plans several recipes sees the same shapes again.

    Args:
        mode: where operations go whose result is not known.
    """

    _known: ClassVar[dict[Any, _Known | None]] = {}
    _plain: ClassVar[dict[Any, bool]] = {}

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._device = torch.device("cpu")
        # All that a fake tensor has in Python is the same for each of a mode, and its constructor takes long to see it.
        self._attributes = FakeTensor(mode, torch.empty((), device="meta"), self._device).__dict__
        self.hits = 0

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of ``func``, as FakeTensorMode would give it."""
        plain = self._plain.get(func)
        if plain is None:
            plain = self._plain[func] = _is_plain(func)
        if not plain:
            return func(*args, **kwargs)
        tensors: list[FakeTensor] = []
        try:
            key: tuple[Any, ...] = (func, _key(args, tensors), _key(tuple(kwargs.items()), tensors) if kwargs else None)
        except _NotPlain:
            return func(*args, **kwargs)
        if not tensors:
            key += (torch.get_default_dtype(),)
        if key not in self._known:
            result = func(*args, **kwargs)
            self._known[key] = _describe(result, tensors)
            return result
        known = self._known[key]
        if known is None:
            return func(*args, **kwargs)
        self.hits += 1
        tensors_made = [self._make(output, tensors) for output in known.outputs]
        if known.kind is FakeTensor:
            return tensors_made[0]
        return None if known.kind is type(None) else known.kind(tensors_made)

    def _make(self, output: _Output, tensors: list[FakeTensor]) -> FakeTensor:
        if output.same_as is not None:
            return tensors[output.same_as]
        with without_dispatch():
            if output.view_of is None:
                meta = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
            else:
                meta = torch.empty((), dtype=output.dtype, device="meta")
                storage = tensors[output.view_of].untyped_storage()
                meta.set_(storage, output.offset, output.shape, output.stride)
            fake: FakeTensor = torch.Tensor._make_subclass(
                FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=self._device
            )
            refuse_data_pointer(fake)
        fake.__dict__.update(self._attributes)
        return fake


class _NotPlain(Exception):
    pass


def _key(value: Any, tensors: list[FakeTensor]) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.layout is not torch.strided:
            raise _NotPlain
        tensors.append(value)
        return (value.shape, value.stride(), value.dtype, value.storage_offset())
    if kind is tuple or kind is list or kind is torch.Size:
        return (kind, *[_key(part, tensors) for part in value])
    if isinstance(value, _PLAIN):
        return (kind, value)
    if kind is torch.Generator:  # nothing is drawn
        return kind
    raise _NotPlain


def _is_plain(func: Any) -> bool:
    """Say whether an operation returns tensors (or nothing) and leaves the geometry of its arguments alone."""
    schema = func._schema
    library, _, name = schema.name.partition("::")
    returned = all(str(r.type) in ("Tensor", "List[Tensor]") for r in schema.returns)
    return returned and library in _LIBRARIES and not name.startswith(_CHANGES_GEOMETRY)


def _describe(result: Any, tensors: list[FakeTensor]) -> _Known | None:
    """Describe a result so that it can be made again; None if it is not plain."""
    parts: list[Any] = [] if result is None else list(result) if isinstance(result, tuple | list) else [result]
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    outputs, fresh = [], []
    for part in parts:
        if type(part) is not FakeTensor or part.constant is not None or part.fake_device.type != "cpu":
            return None
        storage, offset = part.untyped_storage(), int(part.storage_offset())
        same_as = next((index for index, tensor in enumerate(tensors) if tensor is part), None)
        view_of = storages.index(storage._cdata) if storage._cdata in storages else None
        if view_of is None:
            fresh.append(storage._cdata)
            if offset or storage.nbytes() != _extent(part):
                return None
        outputs.append(_Output(part.shape, part.stride(), part.dtype, offset, view_of, same_as))
    if len(set(fresh)) != len(fresh):  # outputs that share a new storage
        return None
    return _Known(type(result), tuple(outputs))


def _extent(tensor: torch.Tensor) -> int:
    """Count the bytes from the first to the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()

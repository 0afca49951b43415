"""Leaves out imports that the planning process has no use for, although libraries make them.

They would take a quarter of the time until it has imported everything. Only for a process that does nothing but plan.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_UNUSED = ("scipy", "sklearn", "boto3")
"""Modules left out: transformers imports the first for losses of object detection, and the second, which needs it,
for assisted generation; accelerate imports the third for a cloud's settings."""
_COMPILER = "torch._dynamo"
_MARKS = ("disable", "assume_constant_result", "allow_in_graph", "graph_break")
"""Decorators and calls of the compiler that mean nothing where nothing is compiled."""


_PARTS = (f"{_COMPILER}.config", f"{_COMPILER}._trace_wrapped_higher_order_op")
"""Parts of the compiler that can be imported alone."""


def do_without() -> None:
    """Leave the imports out from now on; call it before anything but torch is imported."""
    for name in _UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    _put_off_the_compiler()


def compiler_is_put_off() -> bool:
    """Say whether this process has not loaded the compiler."""
    return type(sys.modules.get(_COMPILER)) is _Unloaded


class _Unloaded(ModuleType):
    """Stands in for PyTorch's compiler as long as nobody asks it for more than its marks."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.load()
        return getattr(self, name)

    def load(self) -> None:
        """Become the real compiler; its own names replace the marks, which serve as long as it is loading."""
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)


class _Parts(MetaPathFinder, Loader):
    """Loads the compiler before any part of it is imported that cannot be imported alone."""

    def __init__(self, whole: _Unloaded) -> None:
        self._whole = whole

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(f"{_COMPILER}.") or name in _PARTS or not compiler_is_put_off():
            return None
        self._whole.load()
        return ModuleSpec(name, self) if name in sys.modules else None  # it has loaded that part itself

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module has been loaded already."""


def _put_off_the_compiler() -> None:
    import torch

    spec = importlib.util.find_spec(_COMPILER)
    if _COMPILER in sys.modules or spec is None:
        return
    module: Any = _Unloaded(_COMPILER)
    module.__spec__, module.__file__, module.__path__ = spec, spec.origin, spec.submodule_search_locations
    module.__package__, module.__loader__ = _COMPILER, spec.loader
    for mark in _MARKS:
        setattr(module, mark, _leave_alone)
    sys.modules[_COMPILER] = module
    sys.meta_path.insert(0, _Parts(module))
    setattr(torch, _COMPILER.removeprefix("torch."), module)


def _leave_alone(function: Any = None, *arguments: Any, **options: Any) -> Any:
    if function is None:
        decorate: Callable[[Any], Any] = lambda decorated: decorated  # noqa: E731
        return decorate
    return function

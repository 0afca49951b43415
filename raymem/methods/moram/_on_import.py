"""Importing a module of ours right after somebody imports a heavy one that it extends."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(trigger: str, ours: str) -> None:
    """Import ``ours`` as soon as the top-level module ``trigger`` is imported; at once if it already is."""
    if trigger in sys.modules:
        importlib.import_module(ours)
    else:
        sys.meta_path.insert(0, _Watcher(trigger, ours))


class _Watcher(MetaPathFinder):
    """Stands in front of the other finders until the trigger is asked for, then steps aside."""

    def __init__(self, trigger: str, ours: str) -> None:
        self._trigger, self._ours = trigger, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._trigger:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Following(spec.loader, self._ours)
        return spec


class _Following(Loader):
    """The trigger's own loader, and one import after it."""

    def __init__(self, loader: Loader, ours: str) -> None:
        self._loader, self._ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        package = self._ours.rpartition(".")[0] + "."
        inside = (
            name for name, loaded in list(sys.modules.items()) if name.startswith(package) and _unfinished(loaded)
        )
        if next(inside, None) is None:  # otherwise a module of ours asked for the trigger, and will do the same
            importlib.import_module(self._ours)


def _unfinished(module: ModuleType) -> bool:
    """Whether a module is still being executed."""
    return bool(getattr(module.__spec__, "_initializing", False))

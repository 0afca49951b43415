"""The names that raymem uses of other libraries although they call them private: all of them, and nothing else.

A release may take any of them away. Then whoever needs the name is told which one is missing and which releases have
it; the rest of raymem goes on. Before a library's window in docs/versions.md is widened, this list is what to check.
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from raymem.versions import WINDOWS

if TYPE_CHECKING:
    from torch._guards import active_fake_mode as active_fake_mode
    from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore as FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map

    ControllerCallback: Any
    ReportCallback: Any
    ResizingState: Any
    WorkerGroupCallback: Any
    WorkerGroupStartupFailedError: Any
    WorkerGroupStartupTimeoutError: Any
    TorchBackend: Any

_NAMES = {
    # Shapes without values, for planning: torch has no public way to make them.
    "FakeTensor": "torch._subclasses.fake_tensor.FakeTensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor.FakeTensorMode",
    "DataDependentOutputException": "torch._subclasses.fake_tensor.DataDependentOutputException",
    "DynamicOutputShapeException": "torch._subclasses.fake_tensor.DynamicOutputShapeException",
    "active_fake_mode": "torch._guards.active_fake_mode",
    "FakeStore": "torch.testing._internal.distributed.fake_pg.FakeStore",
    # Every operation of a step, as it is dispatched; documented, but in modules with private names.
    "TorchDispatchMode": "torch.utils._python_dispatch.TorchDispatchMode",
    "is_traceable_wrapper_subclass": "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
    "tree_leaves": "torch.utils._pytree.tree_leaves",
    "tree_map": "torch.utils._pytree.tree_map",
    "without_dispatch": "torch._C._DisableTorchDispatch",
    "refuse_data_pointer": "torch._C._set_throw_on_mutable_data_ptr",
    "meta_registrations": "torch._meta_registrations",
    "sharding_propagation": "torch.distributed.tensor._sharding_prop",
    # The place of a rank's part in a distributed tensor.
    "compute_local_shape_and_global_offset": "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    "current_graph_task_id": "torch._C._current_graph_task_id",
    "ProfilerEventType": "torch._C._profiler._EventType",
    # Tensors of a PEFT layer by the name of the adapter, which are no parameters.
    "BufferDict": "peft.tuners._buffer_dict.BufferDict",
    # How Ray's processes start: on loopback, in sessions of their own, with signals left to the driver.
    "ray_constants": "ray._private.ray_constants",
    "ray_utils": "ray._private.utils",
    "ray_worker": "ray._private.worker",
    # Workers that meet in a file, without an open port.
    "TorchBackend": "ray.train.torch.config._TorchBackend",
    "set_torch_distributed_env_vars": "ray.train.torch.config._set_torch_distributed_env_vars",
    # What a group of workers waits for, and why it was given up.
    "ray_actors": "ray._private.state.actors",
    "ray_internal_kv_get": "ray.experimental.internal_kv._internal_kv_get",
    "ControllerCallback": "ray.train.v2._internal.execution.callback.ControllerCallback",
    "ReportCallback": "ray.train.v2._internal.execution.callback.ReportCallback",
    "ResizingState": "ray.train.v2._internal.execution.controller.state.ResizingState",
    "WorkerGroupCallback": "ray.train.v2._internal.execution.callback.WorkerGroupCallback",
    "WorkerGroupStartupFailedError": "ray.train.v2._internal.exceptions.WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError": "ray.train.v2._internal.exceptions.WorkerGroupStartupTimeoutError",
}
"""Name here -> where it is."""


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(_NAMES[name])


def in_backward() -> bool:
    """Say whether this thread is inside a backward pass."""
    current: int = _load(_NAMES["current_graph_task_id"])()
    return current != -1


@functools.cache
def _load(path: str) -> Any:
    """Import what a dotted path names.

    Raises:
        ImportError: this release of the library has it no more, or not yet.
    """
    home, _, attribute = path.rpartition(".")
    try:
        try:
            return getattr(importlib.import_module(home), attribute)
        except AttributeError:
            return importlib.import_module(path)
    except ImportError as error:
        library = path.split(".")[0]
        raise ImportError(
            f"{path} is not in {library} {version(library)}; raymem is tested with {library} {WINDOWS[library]}"
        ) from error

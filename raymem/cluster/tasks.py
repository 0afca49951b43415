"""Runs functions as Ray tasks: over many items, or one call with resources of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from raymem.recipe.axes import register_again, registered
from raymem.recipe.schema import ScalingSection
from raymem.training.dist_env import DistEnv
from raymem.training.job import GroupTask
from raymem.training.reporter import LocalReporter, Status, unheard

Item = TypeVar("Item")
Result = TypeVar("Result")


_TOLD_EVERY_S = 15.0


def ray_map(
    function: Callable[[Item], Result], items: Sequence[Item], status: Status = unheard
) -> list[Result]:  # fmt: skip
    """Map with one Ray task per item; a lost task is repeated, so its function must write atomically.

    A single item is done here: a worker would have to start and import for longer than that takes.

    Args:
        status: told now and then how many are done, and if no core is free for the others.
    """
    if len(items) == 1:
        return [function(items[0])]
    import ray

    from raymem.cluster.connection import named_losses

    remote = ray.remote(num_cpus=1)(function_of).options(max_retries=3)
    with named_losses("a task"):
        results = [remote.remote(function, item, registered()) for item in items]
        left, told = results, time.monotonic()
        while left:
            done, left = ray.wait(left, timeout=_TOLD_EVERY_S)
            ray.get(done)  # raises what one of them raised
            if left and time.monotonic() - told >= _TOLD_EVERY_S:
                told = time.monotonic()
                cores = f"{ray.available_resources().get('CPU', 0):g} of {ray.cluster_resources().get('CPU', 0):g}"
                status(f"{len(items) - len(left)} of {len(items)} parts are done ({cores} CPU cores are free)")
        return ray.get(results)  # type: ignore[no-any-return]


def function_of(function: Callable[[Item], Result], item: Item, kinds: Mapping[str, Mapping[str, str]]) -> Result:
    """Make one call, under a name: Ray cannot make a task of a ``functools.partial``.

    Args:
        kinds: what the driver has registered.
    """
    register_again(kinds)
    return function(item)


def call_as_worker(function: GroupTask[Result], config: dict[str, Any], scaling: ScalingSection) -> Result:
    """Make one call as a Ray task with the resources of one worker; plain data in, plain values out."""
    return start_as_worker(function, config, scaling).result()


@dataclass(frozen=True)
class Task(Generic[Result]):
    """A Ray task that was started."""

    reference: Any

    def is_done(self) -> bool:
        """Say whether its value is there, or its error."""
        import ray

        return bool(ray.wait([self.reference], timeout=0)[0])

    def result(self) -> Result:
        """Wait for its value, and raise what it raised."""
        import ray

        from raymem.cluster.connection import named_losses

        with named_losses("the work of one worker"):
            result: Result = ray.get(self.reference)
            return result

    def cancel(self) -> None:
        """End it without a value."""
        import ray

        ray.cancel(self.reference, force=True)


def start_as_worker(function: GroupTask[Result], config: dict[str, Any], scaling: ScalingSection) -> Task[Result]:
    """Start a call as :func:`call_as_worker` makes it."""
    import ray

    from raymem.cluster.connection import worker_resources

    resources = worker_resources(scaling)
    threads = max(1, int(resources.get("CPU", 1)))
    names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {option: resources.pop(kind) for kind, option in names.items() if kind in resources}
    options["resources"] = resources
    task = ray.remote(_with_threads).options(**options)
    return Task(task.remote(function, config, scaling, threads, registered()))


def _with_threads(
    function: GroupTask[Result],
    config: dict[str, Any],
    scaling: ScalingSection,
    threads: int,
    kinds: Mapping[str, Mapping[str, str]],
) -> Result:
    torch.set_num_threads(threads)
    register_again(kinds)
    alone = scaling.model_copy(update={"strategy": "ddp"})  # a task has no process group to shard over
    return function(config, DistEnv.of(alone), LocalReporter().progress)

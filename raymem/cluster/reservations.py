"""Reserves host memory with Ray for as long as a piece of work runs in a process that is used again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ray
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group


@contextlib.contextmanager
def reserved(name: str, memory_bytes: int) -> Iterator[None]:
    """Hold host memory of this node, waiting until there is enough; 0 bytes hold nothing.

    Ray Tune could reserve it with a trial's process, but processes are used again, by trials that need more or less.
    """
    if not memory_bytes:
        yield
        return
    free_reservation(name)  # of an earlier attempt that was killed
    node = f"node:{ray.util.get_node_ip_address()}"
    group = placement_group([{"memory": float(memory_bytes), node: 0.001}], name=name)
    try:
        while not group.wait(60):  # `ready()` would start a process only to say so
            pass
        yield
    finally:
        remove_placement_group(group)


def free_reservation(name: str) -> None:
    """Give back the memory that a dead process held, if it held any."""
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        remove_placement_group(get_placement_group(name))

"""Knows the leases that this process works under, so that whoever writes can ask whether they are still its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Hold(Protocol):
    """A lease as the processes of one driver see it."""

    holder: str
    """The random name under which the driver took the lease."""

    def check(self, *, ask: bool = True) -> None:
        """Refuse to go on if the lease is somebody else's by now.

        Args:
            ask: also read the lease where nothing has been heard of it for a while; else only what is known counts.

        Raises:
            StorageError: it is lost; names the new holder.
            TransientStorageError: it cannot be read now.
        """


_holds: dict[str, Hold] = {}
"""Root of a run in its file system -> the lease on the run."""


def holder_of(root: str) -> str | None:
    """Return the holder of the lease that this process has on a run, or None without one."""
    hold = _holds.get(root)
    return None if hold is None else hold.holder


def is_held(holder: str) -> bool:
    """Say whether this process works under the lease of a holder."""
    return any(hold.holder == holder for hold in list(_holds.values()))


@contextlib.contextmanager
def holding(root: str, hold: Hold) -> Iterator[None]:
    """In the block :func:`check` asks the lease before anything at or below ``root`` is written."""
    _holds[root] = hold
    try:
        yield
    finally:
        del _holds[root]


def check(path: str, *, ask: bool = True) -> None:
    """Refuse to write at a path of a run whose lease this process had and lost; see :meth:`Hold.check`."""
    for root, hold in list(_holds.items()):
        if path == root or path.startswith(f"{root}/"):
            hold.check(ask=ask)

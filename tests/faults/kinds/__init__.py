"""Kinds of faults, by what they strike."""

from __future__ import annotations

from tests.faults.fault import Fault
from tests.faults.kinds import files, machine, network, processes, storage, users

KINDS: dict[str, type[Fault]] = {
    kind.name: kind
    for room in (processes, storage, files, machine, network, users)
    for kind in vars(room).values()
    if isinstance(kind, type) and issubclass(kind, Fault) and kind.name
}

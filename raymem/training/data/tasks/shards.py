"""Makes the shards of sources by steps on nodes, which write them straight to where they belong in the storage.

``cache/data/<key>/`` gets its shards one by one and its manifest last; it counts from then on. Until then
``cache/data/.<key>.partial/`` has a note for each step that is done, written after its shards: what these hold. The
files are those, bit for bit, that :func:`raymem.training.data.packed.shards.prepare` makes on one machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, groupby
from pathlib import Path
from typing import Any

from raymem.errors import StorageError
from raymem.storage.publish import seal
from raymem.storage.storage import MARKER, Storage
from raymem.storage.unfinished import temporary
from raymem.training.data.packed.facts import Counts
from raymem.training.data.packed.shards import EncodeSpec, SourcePlan, Task, write_shard
from raymem.training.data.packed.shared import CACHE, cache_dir, fetch_entry
from raymem.training.data.readers import FileBlock
from raymem.training.data.sources.remote import RemoteFile
from raymem.training.data.tasks.copies import fetched

PART_BLOCKS = 8
"""Blocks of one step: at most 128 MiB of JSON lines. A node fetches a file once, however many steps it does of it."""
_STEP_BYTES = 512 << 20
"""More than making tokens of a block takes beside the libraries, by benchmarks/prepare_memory.py."""


@dataclass(frozen=True)
class PartStep:
    """Some blocks in a row of one file, or of one data set of the hub."""

    key: str
    """The directory of the shards."""
    note: str
    """The name of its note in the storage."""
    where: str
    spec: EncodeSpec
    tasks: tuple[Task, ...]
    file: RemoteFile | None
    """The file to fetch first; None for the hub."""
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.where}, {Path(self.note).stem}"


class Sharding:
    """A job that makes the shards of sources; pickled without the list of its steps.

    Args:
        plans: sources that every node can read.
        max_bytes: the largest size of one row.
    """

    what = "preparing the data"

    def __init__(self, storage: Storage, plans: Sequence[SourcePlan], max_bytes: int) -> None:
        self.storage = storage
        self._plans = {plan.key: plan for plan in plans}
        self._max_bytes = max_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return (Sharding, (self.storage, (), self._max_bytes))

    def begin(self) -> None:
        """Give the tokenizers to the nodes. Raises StorageError."""
        for tokenizer in {Path(plan.recipe.tokenizer_path) for plan in self._plans.values()}:
            name = f"{CACHE}/tokenizers/{tokenizer.name}"
            if self.storage.exists(f"{name}/{MARKER}"):
                continue
            files = [path.relative_to(tokenizer).as_posix() for path in tokenizer.rglob("*") if path.is_file()]
            for file in sorted(files, key=lambda file: (file == MARKER, file)):  # two drivers write the same
                self.storage.upload_file(tokenizer / file, f"{name}/{file}")

    def is_committed(self) -> bool:
        """Say whether all sources are there, whole."""
        return all(self._is_there(key) for key in self._plans)

    def steps(self) -> list[PartStep]:
        """Return the steps of all sources."""
        return [step for key in self._plans for step in self._of_source[key]]

    @cached_property
    def _of_source(self) -> dict[str, list[PartStep]]:
        return {key: list(_parts(plan)) for key, plan in self._plans.items()}

    def is_done(self, step: PartStep) -> bool:
        """Say whether a step's note was there when this object first looked."""
        return Path(step.note).name in self._noted[step.key]

    @cached_property
    def _noted(self) -> dict[str, dict[str, int]]:
        return {key: self.storage.sizes(_partial(key)) for key in self._plans}

    def memory_bytes(self, step: PartStep) -> int:
        """Return what making tokens of a block may take."""
        return _STEP_BYTES

    def run(self, step: PartStep) -> None:
        """Make the shards of a step, and upload them.

        Raises:
            DataError: a row cannot be read or used; or the file has changed since it was indexed.
            StorageError: the storage or this node's disk cannot be written.
        """
        if self.storage.exists(step.note):
            return
        tokenizer = fetch_entry(f"tokenizers/{Path(step.spec.tokenizer_path).name}", self.storage)
        spec = replace(step.spec, tokenizer_path=str(tokenizer))
        counts: list[Counts] = []
        files: dict[str, dict[str, Any]] = {}
        with self._readable(step) as tasks:
            for task in tasks:
                with temporary("data") as folder:
                    counts.append(write_shard(spec, folder, task))
                    if (shard := counts[-1]["shard"]) is not None:
                        target = f"{_directory(step.key)}/{shard}"
                        files[shard] = self.storage.upload_file(Path(folder) / shard, target)
        self.storage.write_record(step.note, {"counts": counts, "files": files})

    @contextlib.contextmanager
    def _readable(self, step: PartStep) -> Iterator[Sequence[Task]]:
        """Yield a step's tasks with blocks that are on this node."""
        if step.file is None:
            yield step.tasks
            return
        with fetched(step.file, step.where, cache_dir(self.storage), self._max_bytes) as path:
            yield [Task(task.index, replace(task.block, path=str(path))) for task in step.tasks]

    def commit(self) -> None:
        """Write the manifests, and delete the notes.

        Raises:
            DataError: no example of a source has a token to predict.
            StorageError: a note is missing or damaged, or the storage cannot be written.
        """
        for key, plan in self._plans.items():
            with contextlib.suppress(_Committed):
                counts, files = self._notes(key)
                self.storage.write_json(
                    f"{_directory(key)}/{MARKER}", seal({"facts": plan.facts(counts), "files": files})
                )
            self.storage.delete_dir(_partial(key), last=None)

    def _notes(self, key: str) -> tuple[list[Counts], dict[str, dict[str, Any]]]:
        """Return what the notes of a source say. Raises _Committed if another driver has made it meanwhile."""
        counts: list[Counts] = []
        files: dict[str, dict[str, Any]] = {}
        for step in self._of_source[key]:
            try:
                note = self.storage.read_record(step.note, {"counts": (list,), "files": (dict,)}, cure=_CURE)
            except StorageError:
                if self._is_there(key):
                    raise _Committed from None
                raise
            counts += note["counts"]
            files |= note["files"]
        return counts, files

    def _is_there(self, key: str) -> bool:
        return self.storage.exists(f"{_directory(key)}/{MARKER}")


_CURE = "delete the file, and its part of the data is made again"


class _Committed(Exception):
    """Another driver has made the same data, and deleted its notes."""


def _parts(plan: SourcePlan) -> Iterator[PartStep]:
    numbers = count()
    for path, group in groupby(plan.tasks(), key=lambda task: task.block.path):
        tasks = tuple(group)
        for begin in range(0, len(tasks), PART_BLOCKS):
            part = tasks[begin : begin + PART_BLOCKS]
            file = plan.opened.remote.get(path) if isinstance(part[0].block, FileBlock) else None
            note = f"{_partial(plan.key)}/part-{next(numbers):06d}-by-{PART_BLOCKS}.json"
            yield PartStep(plan.key, note, plan.opened.where, plan.recipe, part, file)


def _directory(key: str) -> str:
    return f"{CACHE}/data/{key}"


def _partial(key: str) -> str:
    return f"{CACHE}/data/.{key}.partial"

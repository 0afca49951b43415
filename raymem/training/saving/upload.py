"""Uploads checkpoints to an object store while training goes on, one at a time.

Each rank has its shards on its own disk when an upload starts, and a thread copies them. Threads take part in no
collective: that all are done is agreed on in the training threads, between two steps. Then a thread of rank 0 writes
the manifest, from which on the checkpoint counts.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from raymem.errors import StorageError
from raymem.storage.publish import seal
from raymem.storage.storage import Storage
from raymem.training.dist_env import DistEnv
from raymem.training.manifest import MANIFEST, Manifest
from raymem.training.saving.background import Background
from raymem.training.saving.kept import FOLDER, folder_of

Files = dict[str, dict[str, Any]]
"""Name of a file -> ``{bytes, sha256}``."""
_DONE, _BUSY, _FAILED = range(3)


@dataclass(frozen=True)
class _Flight:
    """An upload under way."""

    manifest: Manifest
    retain: Callable[[], None]
    work: Background[Any]
    """What this rank does for it now."""
    commits: bool
    """Whether that is the last thing to do: on rank 0 the manifest is written, the others have nothing left to do."""


class Uploads:
    """The uploads of a run's checkpoints. Every method but :meth:`abandon` is collective.

    Args:
        run: storage of the run's directory, an object store.
        dist_env: this process's place.
    """

    def __init__(self, run: Storage, dist_env: DistEnv) -> None:
        self._run, self._dist_env = run, dist_env
        self._flight: _Flight | None = None

    @property
    def step(self) -> int | None:
        """The step of the checkpoint that is being uploaded, the same on all ranks; None if there is none."""
        return None if self._flight is None else self._flight.manifest.step

    def start(
        self, manifest: Manifest, shards: tempfile.TemporaryDirectory[str], write_history: Callable[[], None],
        retain: Callable[[], None],
    ) -> None:  # fmt: skip
        """Begin to upload a checkpoint.

        Args:
            shards: the files of this rank; deleted once they are uploaded.
            write_history: writes what must be there before the checkpoint is; called on rank 0, in its thread.
            retain: deletes older checkpoints; called on rank 0, in its thread, once this one counts.
        """
        assert self._flight is None, "one upload at a time"
        upload = partial(self._upload, folder_of(manifest.step), shards, write_history)
        alone = self._dist_env.world_size == 1  # and so there is nobody to wait for
        work = (lambda: self._commit(manifest, upload(), retain)) if alone else upload
        self._flight = _Flight(manifest, retain, Background(work, "raymem-upload"), commits=alone)

    def look(self) -> None:
        """Take an upload further if every rank is done with its part; never waits for one.

        Raises:
            StorageError: the part of a rank failed; all ranks raise the same, and the upload is given up.
        """
        if self._flight is None:
            return
        work = self._flight.work
        state = _FAILED if work.has_failed else _DONE if work.is_done else _BUSY
        if self._dist_env.max_over_ranks(state) != _BUSY:
            self._go_on(lambda: work.result() if work.is_done else None)

    def finish(self) -> None:
        """Wait until the checkpoint under way counts, if there is one.

        Raises:
            StorageError: see :meth:`look`.
        """
        while self._flight is not None:
            self._go_on(self._flight.work.result)

    def abandon(self) -> None:
        """Give up what is under way, if anything is: it never looks like a whole checkpoint."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.work.abandon()

    def _go_on(self, outcome: Callable[[], Any]) -> None:
        assert self._flight is not None
        try:
            outcomes = self._dist_env.on_all(outcome)
        except Exception:
            self.abandon()
            raise
        flight, self._flight = self._flight, None
        if flight.commits:
            return
        files = {name: facts for of_rank in outcomes for name, facts in of_rank.items()}
        commit = partial(self._commit, flight.manifest, files, flight.retain)
        work = Background(commit if self._dist_env.is_main else _nothing, "raymem-upload")
        self._flight = _Flight(flight.manifest, flight.retain, work, commits=True)

    def _upload(self, name: str, shards: tempfile.TemporaryDirectory[str], write_history: Callable[[], None]) -> Files:
        with shards:
            if self._dist_env.is_main:
                write_history()
            return self._run.upload_dir(shards.name, f"{FOLDER}/{name}", last=None)

    def _commit(self, manifest: Manifest, files: Files, retain: Callable[[], None]) -> None:
        write_manifest(self._run, folder_of(manifest.step), dataclasses.replace(manifest, files=files))
        retain()


def write_manifest(run: Storage, path: str, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint whose files are all there, which makes it whole.

    Args:
        path: its directory among the checkpoints.

    Raises:
        StorageError: other files are there than the ranks wrote, or see :class:`Storage`.
    """
    folder = run.child(FOLDER)
    sizes = {file: facts["bytes"] for file, facts in manifest.files.items()}
    if (there := folder.sizes(path)) != sizes:
        raise StorageError(
            f"{folder.join(path)}: workers wrote {sizes} but {there} are there; set storage.path to a directory "
            "that all nodes share"
        )
    folder.write_json(f"{path}/{MANIFEST}", seal(manifest.to_dict()))


def _nothing() -> None:
    """Do nothing."""

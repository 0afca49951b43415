"""Writes and reads the checkpoints of a run: complete or not there, in safetensors, for any number of workers.

``<run>/checkpoints/step_00000120/`` holds one safetensors file per rank (DCP's sharded format, no pickle) and
``manifest.json``, written last. Only trainable weights, masters and optimizer state are in it; the frozen base is
named, not copied. Local and Ray runs share this form, so a run goes on under either. To an object store it is uploaded
while training goes on (:mod:`raymem.training.saving.upload`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from raymem.errors import CheckpointError, RaymemError, TransientStorageError
from raymem.methods.probe import first_line
from raymem.storage.errors import explain, writing
from raymem.storage.folders import make_directory
from raymem.storage.publish import file_sha256
from raymem.storage.retry import Outage, retrying
from raymem.storage.storage import Storage, sync
from raymem.storage.unfinished import temporary
from raymem.training.dist_env import DistEnv
from raymem.training.manifest import Damaged, Manifest
from raymem.training.saving.kept import (
    FOLDER,
    clear_unfinished,
    complete_steps,
    first_good,
    folder_of,
    prune,
    read_manifest,
    set_aside,
)
from raymem.training.saving.upload import Uploads, write_manifest

__all__ = ["FOLDER", "Checkpoints", "latest_manifest", "latest_recipe"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run. Every method is collective: all ranks call it, with the same arguments.

    Args:
        run: storage of the run's directory.
        dist_env: this process's place.
    """

    def __init__(self, run: Storage, dist_env: DistEnv) -> None:
        self._run = run
        self._dist_env = dist_env
        self._undeleted: set[int] = set()
        """Steps of old checkpoints that could not be deleted, and of which that was said."""
        self._copy: tuple[int, tempfile.TemporaryDirectory[str]] | None = None
        """The step of a checkpoint on an object store and its local copy, which was compared as it was fetched."""
        self._uploads = Uploads(run, dist_env)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the upload under way. A checkpoint is worth waiting for if training has failed, but not if it is killed.

        Of several ranks, those that have not failed may wait in a collective for ever: there it is given up.
        """
        if isinstance(error, Exception) and self.uploading is not None and self._dist_env.world_size == 1:
            log.warning("training has failed; it ends once the checkpoint of step %d is uploaded", self.uploading)
            try:
                self.finish()
            except RaymemError as problem:
                log.warning("that checkpoint could not be uploaded: %s", problem)
        self._uploads.abandon()

    @property
    def uploading(self) -> int | None:
        """The step of the checkpoint that is being uploaded, if there is one; the same on all ranks."""
        return self._uploads.step

    def latest(self) -> Manifest | None:
        """Return the newest good checkpoint, every byte of which is checked, or None if there never was one.

        What is damaged is set aside with a warning, on all ranks alike. One that is being uploaded is waited for.

        Raises:
            CheckpointError: it was written by a newer schema, or none of several is good.
        """
        return self._first_good("last")

    def best(self) -> Manifest | None:
        """Return the good checkpoint of lowest evaluation loss (the newest if none has one); else like latest()."""
        return self._first_good("best")

    def _first_good(self, keep: str) -> Manifest | None:
        self.finish()
        while (manifest := self._dist_env.on_main(lambda: first_good(self._run, keep))) is not None:
            step = manifest.step
            found = self._dist_env.on_all(partial(self._difference, manifest))
            reason = next((reason for reason in found if reason is not None), None)
            if reason is None:
                return manifest
            self._dist_env.on_main(partial(set_aside, self._run, step, reason))
        return None

    def _difference(self, manifest: Manifest) -> str | None:
        """Say which file has other bytes than were written; checkpoints of earlier versions name no digests."""
        path = f"{FOLDER}/{folder_of(manifest.step)}"
        files = sorted(name for name, facts in manifest.files.items() if "sha256" in facts)
        digests: dict[str, str | None]
        if self._run.is_local:
            mine = files[self._dist_env.rank :: self._dist_env.world_size]  # each rank reads its share
            digests = {name: self._run.sha256(f"{path}/{name}") for name in mine}
        else:  # every rank needs all of it
            copied = self._run.download_dir(path, self._fresh_copy(manifest.step), last=None)
            digests = {name: copied.get(name, {}).get("sha256") for name in files}
        for name, sha256 in digests.items():
            if sha256 != manifest.files[name]["sha256"]:
                return f"{name} has other bytes than were written (SHA-256)"
        return None

    def _fresh_copy(self, step: int) -> Path:
        """Return the directory for the files of a checkpoint, in place of that of an earlier one."""
        self.drop_copy()
        self._copy = step, temporary("checkpoint")
        return Path(self._copy[1].name) / "files"

    def drop_copy(self) -> None:
        """Delete the local copy of a checkpoint that was found good and is not loaded."""
        if self._copy is not None:
            self._copy[1].cleanup()
        self._copy = None

    def start(
        self, manifest: Manifest, tensors: dict[str, torch.Tensor], keep: str, num_to_keep: int,
        write_history: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Write a checkpoint, then delete those that the retention rule lets go.

        In a directory it counts when this returns. On an object store it is on the local disk then, the upload goes on
        while training does, and it counts from a later :meth:`look` or :meth:`finish` on. One upload at a time is under
        way: the next call waits for it.

        Args:
            write_history: writes what must be there before the checkpoint is; called on rank 0.

        Raises:
            StorageError: no space or no permission; older checkpoints are untouched and nothing half-written stays.
        """
        self.finish()
        retain = partial(prune, self._run, keep, num_to_keep, self._undeleted)
        if self._run.is_local:
            self._dist_env.on_main(write_history)
            self._save_here(manifest, tensors)
            self._dist_env.on_main(retain)
            return
        shards = self._shards_of_this_rank()
        try:
            self._write(tensors, Path(shards.name), "TMPDIR")
        except BaseException:
            shards.cleanup()
            raise
        self._uploads.start(manifest, shards, write_history, retain)

    def look(self) -> None:
        """See whether the checkpoint that is being uploaded is whole; called between two steps, it waits for nobody.

        Raises:
            StorageError: the upload failed, on whichever rank.
        """
        self._uploads.look()

    def finish(self) -> None:
        """Wait until the checkpoint that is being uploaded counts, if there is one.

        Raises:
            StorageError: the upload failed, on whichever rank.
        """
        self._uploads.finish()

    def save(self, manifest: Manifest, tensors: dict[str, torch.Tensor], keep: str, num_to_keep: int) -> None:
        """Write a checkpoint that counts when this returns; see :meth:`start`."""
        self.start(manifest, tensors, keep, num_to_keep)
        self.finish()

    def clear_unfinished(self, step: int) -> None:
        """Delete what killed uploads have left of checkpoints of later steps than the one that a run goes on from."""
        if not self._run.is_local:  # there it has a name of its own, and is deleted by the next one
            self._dist_env.on_main(lambda: clear_unfinished(self._run, step))

    def _save_here(self, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        name = folder_of(manifest.step)
        staging = self._dist_env.on_main(lambda: self._again(lambda: self._make_staging(name)))
        try:
            self._write(tensors, staging, "storage")
            written = self._dist_env.on_all(lambda: self._again(lambda: self._describe(staging)))
            files = {file: facts for of_rank in written for file, facts in of_rank.items()}
            self._dist_env.on_main(lambda: self._commit(staging, name, dataclasses.replace(manifest, files=files)))
        except RaymemError:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def _shards_of_this_rank(self) -> tempfile.TemporaryDirectory[str]:
        """Make the directory on the local disk from which this rank's shards are uploaded."""
        made: list[tempfile.TemporaryDirectory[str]] = []

        def make() -> None:
            with writing(tempfile.gettempdir(), where="TMPDIR"):
                made.append(temporary("checkpoint"))

        self._dist_env.on_all(make)
        return made[0]

    def load(self, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        """Read a checkpoint into allocated tensors, resharding if it was written by another number of workers.

        Raises:
            CheckpointError: a tensor is missing or has another shape, or a file is damaged.
        """
        path = f"{FOLDER}/{folder_of(manifest.step)}"
        if self._run.is_local:
            directory = Path(self._run.join(path))
        else:
            if self._copy is None or self._copy[0] != manifest.step:  # given by another object
                self._dist_env.on_all(lambda: self._run.download_dir(path, self._fresh_copy(manifest.step)))
            assert self._copy is not None
            directory = Path(self._copy[1].name) / "files"
        try:
            _read_shards(tensors, directory)
        finally:
            self.drop_copy()

    def _again(self, action: Callable[[], T]) -> T:
        return retrying(self._run.path, self._run.retry_for_s, action)

    def _write(self, tensors: dict[str, torch.Tensor], staging: Path, where: str) -> None:
        """Write the shards; all ranks write them again together, when rank 0 says that it is time."""
        outage = Outage(self._run.path, self._run.retry_for_s)
        while True:
            try:
                _write_shards(tensors, staging, where)
            except TransientStorageError as error:
                self._dist_env.on_main(partial(outage.wait, error))
            else:
                break
        outage.end()

    def _make_staging(self, name: str) -> Path:
        """Clear the way: shards that a killed save left would be read as part of this one."""
        folder = Path(self._run.join(FOLDER))
        staging = folder / f".{name}.part"
        with writing(staging):
            make_directory(folder)
            for abandoned in folder.glob(".step_*.part"):
                shutil.rmtree(abandoned)
            staging.mkdir()
        return staging

    def _describe(self, staging: Path) -> dict[str, dict[str, Any]]:
        # On a file system that all ranks share, the others' shards lie beside; the writer numbers them from 1.
        try:
            files = list(staging.glob(f"shard-{self._dist_env.rank + 1:05d}-*"))
            for path in files:  # the manifest must not survive a power cut that its files do not
                sync(path)
            return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
        except OSError as error:
            raise explain(error, "read back what was just written to", str(staging)) from None

    def _commit(self, staging: Path, name: str, manifest: Manifest) -> None:
        write_manifest(self._run, staging.name, manifest)
        folder = self._run.child(FOLDER)
        folder.delete_dir(name)  # a replayed step replaces its older self
        folder.rename_dir(staging.name, name)


def latest_manifest(run: Storage) -> Manifest | None:
    """Return the newest checkpoint of a run directory, or None (no collective; for drivers and tools).

    Manifest and sizes are checked; :meth:`Checkpoints.latest` also reads the files. What is damaged is set aside.

    Raises:
        CheckpointError: see there.
    """
    return first_good(run, "last")


def latest_recipe(run: Storage) -> dict[str, Any] | None:
    """Return the recipe of the newest checkpoint whose manifest is good, whatever its files are; None without one.

    Raises:
        StorageError: a manifest cannot be read.
        CheckpointError: it was written by a newer schema.
    """
    for step in reversed(complete_steps(run)):
        with contextlib.suppress(Damaged):
            return read_manifest(run, step).recipe
    return None


def _write_shards(tensors: dict[str, torch.Tensor], directory: Path, where: str) -> None:
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    # In a run's directory that is done before the manifest is written; what is uploaded needs no place on this disk.
    writer.sync_files = False
    try:
        dcp_save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError) as error:
        again = "run the same command again: it resumes from the last good checkpoint"
        raise explain(_cause(error), "write", str(directory), where=where, then=again) from None


def _read_shards(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    reader = HuggingFaceStorageReader(str(directory))
    try:
        dcp_load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: cannot be read into this recipe's model: {first_line(_cause(error))}; it belongs to another "
            "recipe or is damaged: use --fresh, another name, or delete this checkpoint"
        ) from None


def _cause(error: BaseException) -> Exception:
    """Return the underlying error; DCP wraps one per rank, in an exception that is no Exception."""
    if isinstance(error, CheckpointException):
        first: Any = next(iter(error.failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return error if isinstance(error, Exception) else RuntimeError(str(error))

"""Writes and reads the checkpoints of a run: complete or not there, in safetensors, for any number of workers.

``<run>/checkpoints/step_00000120/`` holds one safetensors file per rank (DCP's sharded format, no pickle) and
``manifest.json``, written last. Only trainable weights, masters and optimizer state are in it; the frozen base is
named, not copied. Local and Ray runs share this form, so a run goes on under either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from raymem.errors import CheckpointError, RaymemError, StorageError, TransientStorageError
from raymem.methods.probe import first_line
from raymem.storage.errors import explain, writing
from raymem.storage.folders import make_directory
from raymem.storage.publish import file_sha256, seal
from raymem.storage.retry import Outage, retrying
from raymem.storage.storage import Storage, sync
from raymem.storage.unfinished import temporary
from raymem.training.dist_env import DistEnv
from raymem.training.manifest import MANIFEST, Damaged, Manifest, parse

log = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER = "checkpoints"
_DAMAGED = "damaged-"


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

    def latest(self) -> Manifest | None:
        """Return the newest good checkpoint, every byte of which is checked, or None if there never was one.

        What is damaged is set aside with a warning, on all ranks alike.

        Raises:
            CheckpointError: it was written by a newer schema, or none of several is good.
        """
        return self._first_good("last")

    def best(self) -> Manifest | None:
        """Return the good checkpoint of lowest evaluation loss (the newest if none has one); else like latest()."""
        return self._first_good("best")

    def _first_good(self, keep: str) -> Manifest | None:
        while (manifest := self._dist_env.on_main(lambda: _first(self._run, keep))) is not None:
            step = manifest.step
            found = self._dist_env.on_all(partial(self._difference, manifest))
            reason = next((reason for reason in found if reason is not None), None)
            if reason is None:
                return manifest
            self._dist_env.on_main(partial(_set_aside, self._run, step, reason))
        return None

    def _difference(self, manifest: Manifest) -> str | None:
        """Say which file has other bytes than were written; checkpoints of earlier versions name no digests."""
        path = f"{FOLDER}/{_name(manifest.step)}"
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

    def save(self, manifest: Manifest, tensors: dict[str, torch.Tensor], keep: str, num_to_keep: int) -> None:
        """Write a checkpoint, then delete those that the retention rule lets go.

        Raises:
            StorageError: no space or no permission; older checkpoints are untouched and nothing half-written stays.
        """
        name = _name(manifest.step)
        staging = self._dist_env.on_main(lambda: self._again(lambda: self._make_staging(name)))
        scratch = None if self._run.is_local else temporary("checkpoint")
        staging = staging if scratch is None else Path(scratch.name)
        try:
            self._write(tensors, staging)
            written = self._dist_env.on_all(lambda: self._finish(staging, name))
            files = {file: facts for of_rank in written for file, facts in of_rank.items()}
            self._dist_env.on_main(lambda: self._commit(staging, name, dataclasses.replace(manifest, files=files)))
        except RaymemError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            if scratch is not None:
                scratch.cleanup()
        self._dist_env.on_main(lambda: prune(self._run, keep, num_to_keep, self._undeleted))

    def load(self, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        """Read a checkpoint into allocated tensors, resharding if it was written by another number of workers.

        Raises:
            CheckpointError: a tensor is missing or has another shape, or a file is damaged.
        """
        path = f"{FOLDER}/{_name(manifest.step)}"
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

    def _write(self, tensors: dict[str, torch.Tensor], staging: Path) -> None:
        """Write the shards; all ranks write them again together, when rank 0 says that it is time."""
        outage = Outage(self._run.path, self._run.retry_for_s)
        while True:
            try:
                _write_shards(tensors, staging)
            except TransientStorageError as error:
                self._dist_env.on_main(partial(outage.wait, error))
            else:
                break
        outage.end()

    def _make_staging(self, name: str) -> Path:
        """Clear the way: shards that a killed save left would be read as part of this one."""
        if not self._run.is_local:
            self._run.delete_dir(f"{FOLDER}/{name}")
            return Path()
        folder = Path(self._run.join(FOLDER))
        staging = folder / f".{name}.part"
        with writing(staging):
            make_directory(folder)
            for abandoned in folder.glob(".step_*.part"):
                shutil.rmtree(abandoned)
            staging.mkdir()
        return staging

    def _finish(self, staging: Path, name: str) -> dict[str, dict[str, Any]]:
        """Describe the files that this rank wrote, for the manifest, and bring them where they belong."""
        if self._run.is_local:
            return self._again(lambda: self._describe(staging))
        return self._run.upload_dir(staging, f"{FOLDER}/{name}", last=None)

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
        folder = self._run.child(FOLDER)
        path = staging.name if self._run.is_local else name
        sizes = {file: facts["bytes"] for file, facts in manifest.files.items()}
        if (there := folder.sizes(path)) != sizes:
            raise StorageError(
                f"{folder.join(path)}: workers wrote {sizes} but {there} are there; set storage.path to a directory "
                "that all nodes share"
            )
        folder.write_json(f"{path}/{MANIFEST}", seal(manifest.to_dict()))
        if not self._run.is_local:
            return
        folder.delete_dir(name)  # a replayed step replaces its older self
        folder.rename_dir(staging.name, name)


def latest_manifest(run: Storage) -> Manifest | None:
    """Return the newest checkpoint of a run directory, or None (no collective; for drivers and tools).

    Manifest and sizes are checked; :meth:`Checkpoints.latest` also reads the files. What is damaged is set aside.

    Raises:
        CheckpointError: see there.
    """
    return _first(run, "last")


def latest_recipe(run: Storage) -> dict[str, Any] | None:
    """Return the recipe of the newest checkpoint whose manifest is good, whatever its files are; None without one.

    Raises:
        StorageError: a manifest cannot be read.
        CheckpointError: it was written by a newer schema.
    """
    for step in reversed(_complete_steps(run)):
        with contextlib.suppress(Damaged):
            return _read_manifest(run, step).recipe
    return None


def _first(run: Storage, keep: str) -> Manifest | None:
    """Return the checkpoint that a retention rule prefers, setting aside what is damaged by manifest or sizes."""
    good = _good_manifests(run, keep)
    if not good and (damaged := [name for name in run.list_dirs(FOLDER) if name.startswith(_DAMAGED)]):
        raise CheckpointError(
            f"{run.join(FOLDER, damaged[-1])}: damaged, and there is no good checkpoint to go on from; put a good copy "
            f"back as {damaged[-1].removeprefix(_DAMAGED)[:13]}, choose another name, or start over with --fresh"
        )
    return good[0] if good else None


def prune(run: Storage, keep: str, num_to_keep: int, undeleted: set[int]) -> None:
    """Delete all but ``num_to_keep`` checkpoints: the newest, or those of lowest evaluation loss and the newest.

    One that cannot be deleted costs space and no run: it is named in a warning and tried again the next time.

    Args:
        undeleted: steps whose deletion failed before; gains those that fail now.
    """
    ranked = [manifest.step for manifest in _good_manifests(run, keep)]
    newest = max(ranked, default=0)
    keep_steps = {*ranked[:num_to_keep], newest}
    half_deleted = [step for step in _steps(run) if step < newest and step not in ranked]
    for step in [*half_deleted, *(step for step in ranked if step not in keep_steps)]:
        try:
            run.delete_dir(f"{FOLDER}/{_name(step)}")
        except StorageError as error:
            if step not in undeleted:
                log.warning("an old checkpoint stays until the next one is saved: %s", error)
            undeleted.add(step)


def _good_manifests(run: Storage, keep: str) -> list[Manifest]:
    """Read all manifests, the preferred first (of equal losses the newer one), setting aside what is damaged."""
    good: list[Manifest] = []
    for step in reversed(_complete_steps(run)):
        try:
            manifest = _read_manifest(run, step)
            _check_sizes(run, manifest)
        except Damaged as damage:
            _set_aside(run, step, str(damage))
        else:
            good.append(manifest)

    def rank(manifest: Manifest) -> float:
        loss = manifest.eval_loss
        return math.inf if loss is None or math.isnan(loss) else loss

    return good if keep == "last" else sorted(good, key=rank)


def _set_aside(run: Storage, step: int, reason: str) -> None:
    """Rename a damaged checkpoint, so that it is neither read nor replaced nor deleted."""
    name = new = f"{_DAMAGED}{_name(step)}"
    number = 2
    while run.exists(f"{FOLDER}/{new}"):
        new, number = f"{name}-{number}", number + 1
    run.rename_dir(f"{FOLDER}/{_name(step)}", f"{FOLDER}/{new}")
    log.warning(
        "%s: %s; the damaged checkpoint is set aside as %s, and an older one is looked for",
        run.join(FOLDER, _name(step)), reason, new,
    )  # fmt: skip


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _steps(run: Storage) -> list[int]:
    """List the steps of all checkpoints, whole or not, in order."""
    names = [name for name in run.list_dirs(FOLDER) if re.fullmatch(r"step_[0-9]{8,18}", name)]
    return [step for step in sorted(int(name[5:]) for name in names) if _name(step) in names]


def _complete_steps(run: Storage) -> list[int]:
    return [step for step in _steps(run) if run.exists(f"{FOLDER}/{_name(step)}/{MANIFEST}")]


def _read_manifest(run: Storage, step: int) -> Manifest:
    path = f"{FOLDER}/{_name(step)}"
    return parse(run.read_bytes(f"{path}/{MANIFEST}"), step, run.join(path))


def _check_sizes(run: Storage, manifest: Manifest) -> None:
    sizes = run.sizes(f"{FOLDER}/{_name(manifest.step)}")
    for name, facts in manifest.files.items():
        if (size := sizes.get(name)) != facts["bytes"]:
            raise Damaged(
                f"{name} is missing" if size is None else f"{name} has {size} bytes instead of {facts['bytes']}"
            )


def _write_shards(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        dcp_save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError) as error:
        again = "run the same command again: it resumes from the last good checkpoint"
        raise explain(_cause(error), "write", str(directory), then=again) from None


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

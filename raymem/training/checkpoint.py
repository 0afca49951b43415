"""Writes and reads the checkpoints of a run: complete or not there, in safetensors, for any number of workers.

``<run>/checkpoints/step_00000120/`` holds one safetensors file per rank (DCP's sharded format, no pickle) and
``manifest.json``, written last. Only trainable weights, masters and optimizer state are in it; the frozen base is
named, not copied. Local and Ray runs share this form, so a run goes on under either.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from raymem import __version__
from raymem.errors import CheckpointError, RaymemError, StorageError
from raymem.storage.storage import Storage, sync
from raymem.training.dist_env import DistEnv
from raymem.training.reporter import Row

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
"""Version of the manifest; version 1 had the state of a single hook, under a key of its own."""
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint that is stored with it."""

    step: int
    """Optimizer steps done. Sampler, schedule and every random stream are functions of (seed, step): with the recipe
    this is their whole state."""
    identity: dict[str, Any]
    """Settings that the state depends on (:func:`raymem.training.resume_rules.identity_of`)."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    eval_loss: float | None
    """The evaluation loss at this step, if there are evaluation data."""
    rows: list[Row] = field(default_factory=list)
    """Rows of metrics since the checkpoint before: a crash may lose a report, which a resumed run sends again."""
    hooks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The state of each hook that has one, by name (:mod:`raymem.hooks`)."""
    peak_bytes: int | None = None
    """The highest peak that was measured so far; a session that is resumed near its end measures none."""
    elapsed_s: float = 0.0
    """Seconds of all sessions so far."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "raymem": __version__,
            "step": self.step,
            "identity": self.identity,
            "recipe": self.recipe,
            "eval_loss": self.eval_loss,
            "rows": self.rows,
            "hooks": self.hooks,
            "peak_bytes": self.peak_bytes,
            "elapsed_s": self.elapsed_s,
        }


class Checkpoints:
    """The checkpoints of one run. Every method is collective: all ranks call it, with the same arguments.

    Args:
        run: storage of the run's directory.
        dist_env: this process's place.
    """

    def __init__(self, run: Storage, dist_env: DistEnv) -> None:
        self._run = run
        self._dist_env = dist_env

    def latest(self) -> Manifest | None:
        """Return the newest complete checkpoint, or None.

        Raises:
            CheckpointError: it was written by a newer schema or is damaged.
        """
        return self._dist_env.on_main(lambda: latest_manifest(self._run))

    def best(self) -> Manifest | None:
        """Return the complete checkpoint of lowest evaluation loss (the newest if none has one), or None."""

        def find() -> Manifest | None:
            ranked = _ranked(self._run, "best")
            return _read_manifest(self._run, ranked[0]) if ranked else None

        return self._dist_env.on_main(find)

    def save(self, manifest: Manifest, tensors: dict[str, torch.Tensor], keep: str, num_to_keep: int) -> None:
        """Write a checkpoint, then delete those that the retention rule lets go.

        Raises:
            StorageError: no space or no permission; older checkpoints are untouched and nothing half-written stays.
        """
        name = _name(manifest.step)
        staging = self._dist_env.on_main(lambda: self._make_staging(name))
        if not self._run.is_local:
            staging = Path(tempfile.mkdtemp(prefix="raymem-checkpoint-"))
        try:
            _write_shards(tensors, staging)
            if not self._run.is_local:
                self._run.upload_dir(staging, f"{FOLDER}/{name}", last=None)
            self._dist_env.barrier()
            self._dist_env.on_main(lambda: self._commit(staging, name, manifest))
        except RaymemError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        if not self._run.is_local:
            shutil.rmtree(staging, ignore_errors=True)
        self._dist_env.on_main(lambda: prune(self._run, keep, num_to_keep))

    def load(self, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        """Read a checkpoint into allocated tensors, resharding if it was written by another number of workers.

        Raises:
            CheckpointError: a tensor is missing or has another shape, or a file is damaged.
        """
        path = f"{FOLDER}/{_name(manifest.step)}"
        if self._run.is_local:
            directory, temporary = Path(self._run.join(path)), None
        else:
            temporary = tempfile.TemporaryDirectory(prefix="raymem-checkpoint-")
            directory = Path(temporary.name) / "files"
            self._run.download_dir(path, directory)
        try:
            _read_shards(tensors, directory)
        finally:
            if temporary is not None:
                temporary.cleanup()

    def _make_staging(self, name: str) -> Path:
        """Clear the way: shards that a killed save left would be read as part of this one."""
        if not self._run.is_local:
            self._run.delete_dir(f"{FOLDER}/{name}")
            return Path()
        folder = Path(self._run.join(FOLDER))
        staging = folder / f".{name}.part"
        try:
            for abandoned in folder.glob(".step_*.part"):
                shutil.rmtree(abandoned)
            staging.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"{staging}: cannot be created: {error.strerror}; check storage.path") from None
        return staging

    def _commit(self, staging: Path, name: str, manifest: Manifest) -> None:
        folder = self._run.child(FOLDER)
        path = staging.name if self._run.is_local else name
        files = {file: {"bytes": size} for file, size in folder.sizes(path).items()}
        if self._run.is_local:
            for file in files:  # the manifest must not survive a power cut that its files do not
                sync(staging / file)
        folder.write_json(f"{path}/manifest.json", {**manifest.to_dict(), "files": files})
        if not self._run.is_local:
            return
        folder.delete_dir(name)  # a replayed step replaces its older self
        staging.rename(folder.join(name))


def latest_manifest(run: Storage) -> Manifest | None:
    """Return the newest complete checkpoint of a run directory, or None (no collective; for drivers and tools)."""
    steps = _complete_steps(run)
    return _read_manifest(run, steps[-1]) if steps else None


def latest_recipe(run: Storage) -> dict[str, Any] | None:
    """Return the recipe of the newest checkpoint, even if its other files are damaged; None if there is no checkpoint.

    Raises:
        StorageError: the manifest cannot be read.
    """
    steps = _complete_steps(run)
    return dict(run.read_json(f"{FOLDER}/{_name(steps[-1])}/manifest.json")["recipe"]) if steps else None


def prune(run: Storage, keep: str, num_to_keep: int) -> None:
    """Delete all but ``num_to_keep`` checkpoints: the newest, or those of lowest evaluation loss and the newest."""
    ranked = _ranked(run, keep)
    keep_steps = {*ranked[:num_to_keep], max(ranked, default=0)}
    for step in ranked:
        if step not in keep_steps:
            run.delete_dir(f"{FOLDER}/{_name(step)}")


def _ranked(run: Storage, keep: str) -> list[int]:
    """List the steps of all complete checkpoints, the best first; of equal losses the newer one."""
    newest_first = list(reversed(_complete_steps(run)))
    if keep == "last":
        return newest_first
    losses = {step: _read_manifest(run, step).eval_loss for step in newest_first}

    def rank(step: int) -> float:
        loss = losses[step]
        return math.inf if loss is None or math.isnan(loss) else loss

    return sorted(newest_first, key=rank)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _complete_steps(run: Storage) -> list[int]:
    names = [name for name in run.list_dirs(FOLDER) if name.startswith("step_")]
    return sorted(int(name[5:]) for name in names if run.exists(f"{FOLDER}/{name}/manifest.json"))


def _read_manifest(run: Storage, step: int) -> Manifest:
    path = f"{FOLDER}/{_name(step)}"
    raw = run.read_json(f"{path}/manifest.json")
    if raw.get("schema") not in (1, SCHEMA_VERSION):
        raise CheckpointError(
            f"{run.join(path)}: written with checkpoint schema {raw.get('schema')} by raymem {raw.get('raymem')}, "
            f"this is raymem {__version__} with schema {SCHEMA_VERSION}; use that version, or start over with --fresh"
        )
    sizes = run.sizes(path)
    for name, facts in raw["files"].items():
        if sizes.get(name) != facts["bytes"]:
            raise CheckpointError(
                f"{run.join(path, name)}: missing or truncated; delete {run.join(path)} to resume from an older one"
            )
    return Manifest(
        raw["step"], raw["identity"], raw["recipe"], raw["eval_loss"], raw["rows"], _hook_states(raw),
        raw.get("peak_bytes"), raw.get("elapsed_s", 0.0),
    )  # fmt: skip


def _hook_states(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if raw["schema"] == 1:
        return {"loract": {"ranks": raw["ranks"]}} if raw["ranks"] else {}
    return dict(raw["hooks"])


def _write_shards(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        dcp_save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError) as error:
        raise StorageError(
            f"{directory}: the checkpoint cannot be written: {_cause(error)}; free some space or check permissions, "
            "then run the same command again: it resumes from the last good checkpoint"
        ) from None


def _read_shards(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    reader = HuggingFaceStorageReader(str(directory))
    try:
        dcp_load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: cannot be read into this recipe's model: {_cause(error)}; it belongs to another recipe or "
            "is damaged: use --fresh, another name, or delete this checkpoint"
        ) from None


def _cause(error: BaseException) -> str:
    """Return the underlying message; DCP wraps one exception per rank."""
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

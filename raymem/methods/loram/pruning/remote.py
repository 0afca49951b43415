"""Pruning with its files on an object store: each step has local copies of what it reads, and uploads what it writes.

The result lies in ``<name>/``, where its shards appear one by one and the manifest last; it counts as whole once that
is there. Everything else lies in ``<directory>/.<name>.partial/`` until then. Weights of the full model are read where
they are, by ranges.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from raymem.errors import ModelError
from raymem.methods.loram.manifest import MANIFEST
from raymem.methods.loram.pruning.job import CALIBRATION, PruneJob, describe, sha256_of, shard_names
from raymem.methods.loram.pruning.prune import Pruning
from raymem.methods.loram.pruning.steps import Step, memory_bytes, reads, result_of, steps
from raymem.methods.loram.validate import validate_coupling
from raymem.storage.checksums import write_checksums
from raymem.storage.remote.files import RemoteDirectory
from raymem.storage.safetensors_io import save_tensors
from raymem.storage.storage import Storage
from raymem.storage.unfinished import temporary

_CONFIG = "config.json"


class RemotePruning:
    """A pruning job in steps, to be done anywhere that reaches the storage. Pickled as paths and plain values.

    Args:
        job: its directories are not used.
        storage: on an object store.
        name: directory of the result in the storage.
    """

    what = "pruning"

    def __init__(self, job: PruneJob, storage: Storage, name: str) -> None:
        self.job, self.storage, self.name = job, storage, name
        path = PurePosixPath(name)
        self._partial = str(path.with_name(f".{path.name}.partial"))
        self._there: set[str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (RemotePruning, (self.job, self.storage, self.name))

    def begin(self, calibration: torch.Tensor | None) -> None:
        """Upload what steps read of the job, unless that has been done.

        Args:
            calibration: token ids [N, T] of the job.

        Raises:
            ModelError: the coupling does not hold for the model.
            StorageError: the storage cannot be written.
        """
        if self.storage.exists(f"{self._partial}/{_CONFIG}"):
            return
        validate_coupling(self.job.source.config())
        with temporary("prune") as folder:
            if calibration is not None:
                save_tensors(Path(folder) / CALIBRATION, {"ids": calibration})
                self.storage.upload_file(Path(folder) / CALIBRATION, f"{self._partial}/work/{CALIBRATION}")
        self.storage.upload_file(Path(self.job.source.directory) / _CONFIG, f"{self._partial}/{_CONFIG}")

    def is_committed(self) -> bool:
        """Say whether the pruned model is there."""
        return self.storage.exists(f"{self.name}/{MANIFEST}")

    def steps(self) -> list[Step]:
        """Return all steps, in an order in which they can be done."""
        return steps(self.job)

    def is_done(self, step: Step) -> bool:
        """Say whether a step's result was there when this object first looked."""
        if self._there is None:
            self._there = {*self.storage.sizes(self.name), *self.storage.sizes(f"{self._partial}/work")}
        return result_of(self.job, step) in self._there

    def memory_bytes(self, step: Step) -> int:
        """Most that a step holds."""
        return memory_bytes(self.job, step)

    def run(self, step: Step) -> None:
        """Do a step in a temporary directory, or nothing if it is done.

        Raises:
            ModelError: this machine does not see the model, or a shard of it is damaged.
            StorageError: the storage cannot be read or written.
        """
        if self.is_done(step):
            return
        weights = self.job.source.weights
        if "://" not in weights and not Path(weights).is_dir():
            raise ModelError(
                f"model.name: {weights} is not there on node {os.uname().nodename}; copy the model into the bucket and "
                "set model.name to that address, or give a Hugging Face id"
            )
        with temporary("prune") as folder:
            job = self._inside(Path(folder))
            read = reads(job, step)
            self.storage.download_file(f"{self._partial}/{_CONFIG}", Path(job.source.directory) / _CONFIG)
            job.work.mkdir(parents=True)
            for file in read:
                self.storage.download_file(f"{self._partial}/work/{file}", job.work / file)
            Pruning(job).run(step)
            self._keep(job, result_of(job, step), read)

    def commit(self) -> None:
        """Make the pruned model appear.

        Raises:
            ModelError: a shard is missing.
            StorageError: the storage cannot be read or written.
        """
        if not self.is_committed():
            with temporary("prune") as folder:
                job, directory = self._inside(Path(folder)), Path(folder) / "result"
                directory.mkdir()
                described = dataclasses.replace(job, source=self.job.source)
                describe(described, directory, RemoteDirectory(self.storage.join(self.name)))
                notes = {file: f"{self._partial}/work/{sha256_of(job, file).name}" for file in shard_names(job)}
                digests = {file: str(self.storage.read_json(note)) for file, note in notes.items()}
                write_checksums(directory, digests, elsewhere=True)
                for path in sorted(directory.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
                    self.storage.upload_file(path, f"{self.name}/{path.name}")
        self.storage.delete_dir(self._partial, last=None)

    def _inside(self, folder: Path) -> PruneJob:
        """Return the job with its files in a local directory."""
        source = dataclasses.replace(self.job.source, directory=str(folder / "model"))
        return dataclasses.replace(self.job, source=source, out=str(folder / "out"))

    def _keep(self, job: PruneJob, last: str, read: list[str]) -> None:
        """Upload what a step has written, the file that says so last, and delete what no step reads any more."""
        written = [path for path in job.workspace.rglob("*") if path.is_file() and path.name not in read]
        for path in sorted(written, key=lambda path: (path.name == last, path.name)):
            directory = self.name if path.parent == job.workspace else f"{self._partial}/work"
            self.storage.upload_file(path, f"{directory}/{path.name}")
        for file in read:
            if not (job.work / file).exists():
                self.storage.delete_file(f"{self._partial}/work/{file}")

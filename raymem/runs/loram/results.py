"""Reads and writes what the stages of LoRAM leave in a run, on a local disk and on an object store alike."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raymem.errors import ModelError
from raymem.methods.loram import mark_aligned
from raymem.methods.loram.manifest import MANIFEST
from raymem.methods.loram.recover import WEIGHTS
from raymem.storage.checksums import CHECKSUMS, check_files
from raymem.storage.errors import writing
from raymem.storage.remote.copies import fetched
from raymem.storage.remote.files import directory_at
from raymem.storage.storage import Storage
from raymem.storage.unfinished import temporary
from raymem.training.artifacts.card import write_card
from raymem.training.artifacts.facts import FACTS
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import fetch

RECOVERED = "recovered"


def here(location: str, *, weights_too: bool = False) -> Path:
    """Return the directory with a model's files on this node.

    Raises:
        ModelError, StorageError: it cannot be had.
    """
    return fetch(location, None, DistEnv(), weights_too=weights_too)


def local_result(location: str) -> Path | None:
    """Return the directory with a result's files on this node; None if it is not there, whole.

    Raises:
        StorageError: that cannot be known, or it cannot be fetched.
    """
    if not (directory_at(location) / FACTS).is_file():
        return None
    return fetched(location, ["*"]) if "://" in location else Path(location)


def write_recovery(run: Storage, recover: Callable[[Path], object]) -> None:
    """Write the adapter of the full model into a run.

    Args:
        recover: writes it to a directory, which it makes.

    Raises:
        StorageError: it cannot be written.
    """
    if not run.is_local:
        with temporary("recover") as folder:
            out = Path(folder) / RECOVERED
            recover(out)
            write_card(out)
            run.upload_dir(out, RECOVERED, last=FACTS)
        return
    out = Path(run.join(RECOVERED))
    for left in out.parent.glob(f".{out.name}.*.tmp"):  # of a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    recover(out)
    with writing(out):
        write_card(out)


def note_alignment(run: Storage, model: str, pruned: Path, facts: Mapping[str, Any]) -> None:
    """Give the model that an aligning run has left its manifest.

    Args:
        model: its directory or address.
        pruned: the files of the model that was trained.
        facts: about the training.

    Raises:
        ModelError: it has other sizes.
        StorageError: it cannot be written.
    """
    if run.is_local:
        mark_aligned(model, pruned, facts)
        return
    name = model.partition("?")[0].rpartition("/")[2]
    with temporary("align") as folder:
        directory = Path(folder) / name
        shutil.copytree(here(model), directory)
        mark_aligned(directory, pruned, facts, weights=model)
        for file in (MANIFEST, CHECKSUMS):
            run.upload_file(directory / file, f"{name}/{file}")


def whole(location: str, cure: str = "it is gone; run the stage before again") -> Path:
    """Return the files of a result on this node.

    Raises:
        ModelError: it is not there (with ``cure``), or a file is not as raymem wrote it.
    """
    directory = local_result(location)
    if directory is None:
        raise ModelError(f"{location}: {cure}")
    check_files(directory, ModelError)
    return directory


_RECORDED: dict[str, dict[str, tuple[type, ...]]] = {
    "verify": {"key": (str,), "verification": (dict,)},
    "train": {"key": (str,), "outcome": (dict,)},
}


def record_of(run_storage: Storage, stage: str) -> dict[str, Any]:
    """Return what a stage noted in a run; empty if it has not been done.

    Raises:
        StorageError: it cannot be read, or was changed.
    """
    name = f"loram/{stage}.json"
    if not run_storage.exists(name):
        return {}
    cure = "delete the file: this stage is then done again"
    return run_storage.read_record(name, _RECORDED.get(stage), cure=cure)


def weights_sha256(adapter: Path) -> str:
    """Return the hex SHA-256 of the weights in an adapter's directory."""
    return hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()

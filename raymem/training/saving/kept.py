"""Knows the checkpoints that a run has: which are whole, which is preferred, which may go.

None of it is collective: one process, rank 0, decides for all.
"""

from __future__ import annotations

import logging
import math
import re

from raymem.errors import CheckpointError, StorageError
from raymem.storage.storage import Storage
from raymem.training.manifest import MANIFEST, Damaged, Manifest, parse

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
_DAMAGED = "damaged-"


def first_good(run: Storage, keep: str) -> Manifest | None:
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
            run.delete_dir(f"{FOLDER}/{folder_of(step)}")
        except StorageError as error:
            if step not in undeleted:
                log.warning("an old checkpoint stays until the next one is saved: %s", error)
            undeleted.add(step)


def clear_unfinished(run: Storage, step: int) -> None:
    """Delete the directories of later steps than ``step`` that have no manifest: killed uploads left them.

    Their files would be taken for files of the same step's next upload.
    """
    whole = complete_steps(run)
    for later in _steps(run):
        if later > step and later not in whole:
            run.delete_dir(f"{FOLDER}/{folder_of(later)}")


def _good_manifests(run: Storage, keep: str) -> list[Manifest]:
    """Read all manifests, the preferred first (of equal losses the newer one), setting aside what is damaged."""
    good: list[Manifest] = []
    for step in reversed(complete_steps(run)):
        try:
            manifest = read_manifest(run, step)
            _check_sizes(run, manifest)
        except Damaged as damage:
            set_aside(run, step, str(damage))
        else:
            good.append(manifest)

    def rank(manifest: Manifest) -> float:
        loss = manifest.eval_loss
        return math.inf if loss is None or math.isnan(loss) else loss

    return good if keep == "last" else sorted(good, key=rank)


def set_aside(run: Storage, step: int, reason: str) -> None:
    """Rename a damaged checkpoint, so that it is neither read nor replaced nor deleted."""
    name = new = f"{_DAMAGED}{folder_of(step)}"
    number = 2
    while run.exists(f"{FOLDER}/{new}"):
        new, number = f"{name}-{number}", number + 1
    run.rename_dir(f"{FOLDER}/{folder_of(step)}", f"{FOLDER}/{new}")
    log.warning(
        "%s: %s; the damaged checkpoint is set aside as %s, and an older one is looked for",
        run.join(FOLDER, folder_of(step)), reason, new,
    )  # fmt: skip


def folder_of(step: int) -> str:
    """Name the directory of a checkpoint."""
    return f"step_{step:08d}"


def _steps(run: Storage) -> list[int]:
    """List the steps of all checkpoints, whole or not, in order."""
    names = [name for name in run.list_dirs(FOLDER) if re.fullmatch(r"step_[0-9]{8,18}", name)]
    return [step for step in sorted(int(name[5:]) for name in names) if folder_of(step) in names]


def complete_steps(run: Storage) -> list[int]:
    """List the steps of checkpoints that have a manifest, in order."""
    return [step for step in _steps(run) if run.exists(f"{FOLDER}/{folder_of(step)}/{MANIFEST}")]


def read_manifest(run: Storage, step: int) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        Damaged: it is not as it was written.
        CheckpointError: it was written by a newer schema.
        StorageError: it cannot be read.
    """
    path = f"{FOLDER}/{folder_of(step)}"
    return parse(run.read_bytes(f"{path}/{MANIFEST}"), step, run.join(path))


def _check_sizes(run: Storage, manifest: Manifest) -> None:
    sizes = run.sizes(f"{FOLDER}/{folder_of(manifest.step)}")
    for name, facts in manifest.files.items():
        if (size := sizes.get(name)) != facts["bytes"]:
            raise Damaged(
                f"{name} is missing" if size is None else f"{name} has {size} bytes instead of {facts['bytes']}"
            )

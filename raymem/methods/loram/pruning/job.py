"""One pruning job: from which model to which directory, where its files lie meanwhile, and how it is committed.

While it runs, everything is in a hidden directory beside the result, named by the job's key: shards of the result at
the top, calibration state in ``work/``. :func:`commit` adds config, index and manifest and renames it. So the result
exists only as a whole, a killed job goes on, and another job (other options, another model) never finds its files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raymem.errors import DataError, ModelError
from raymem.methods.loram.config import PruneOptions
from raymem.methods.loram.coupling import Coupling
from raymem.methods.loram.manifest import MANIFEST, Manifest, read_manifest
from raymem.methods.loram.nonuniform import Counts, counts_of, with_counts
from raymem.methods.loram.pruning.plan import plan_pruning
from raymem.methods.loram.source import Source, open_source
from raymem.methods.loram.validate import validate_coupling
from raymem.storage.checksums import check_files, write_checksums
from raymem.storage.errors import writing
from raymem.storage.folders import make_directory
from raymem.storage.inside import leads_out
from raymem.storage.json_files import as_object, parse
from raymem.storage.safetensors_io import (
    INDEX,
    Directory,
    Entry,
    Spec,
    digest,
    read_header,
    save_tensors,
    sync_directory,
    write_json,
    write_tensors,
)

_TAG = "raymem"
"""Metadata entry of a shard: its job and the units it kept."""
_FORMAT = 1
"""Raised when the same options would choose other units or write other bytes."""
CALIBRATION = "calibration.safetensors"
_COPIED = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "generation_config")
"""Files whose names start so belong to a model and are copied."""


@dataclass(frozen=True)
class PruneJob:
    """Plain values only, so that a job travels between processes."""

    source: Source
    coupling: Coupling
    options: PruneOptions
    counts: Counts
    pruned_layers: tuple[int, ...]
    out: str
    """Directory of the result."""
    key: str
    calibration: str | None
    """SHA-256 of the calibration tokens."""

    @property
    def workspace(self) -> Path:
        """Where the job's files lie until it is committed."""
        out = Path(self.out)
        return out.with_name(f".{out.name}.{self.key[:16]}.partial")

    @property
    def work(self) -> Path:
        """Where state lies that is not part of the result."""
        return self.workspace / "work"


def job_key(source: Source, options: PruneOptions, calibration: torch.Tensor | None) -> str:
    """Equal for jobs that write the same bytes: of the source's content, the options and the calibration tokens."""
    shape = None if calibration is None else list(calibration.shape)
    chosen = dataclasses.asdict(options)
    if not options.refit:
        del chosen["refit"]  # what was pruned before there was this option keeps its key
    return digest([_FORMAT, chosen, source.identity, _sha256(calibration), shape])


def _sha256(calibration: torch.Tensor | None) -> str | None:
    return None if calibration is None else hashlib.sha256(calibration.contiguous().numpy().tobytes()).hexdigest()


def open_job(
    model: str | Path | Source,
    out: str | Path,
    options: PruneOptions,
    calibration: torch.Tensor | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
) -> PruneJob:
    """Check everything that can be checked before work starts, and make the job's workspace.

    Args:
        name: Hugging Face id, if ``model`` is a download.
        revision: commit of that id.

    Raises:
        ModelError, RecipeError, DataError: see :func:`describe_job`; also if the source is damaged, its coupling does
            not hold, or ``out`` is taken.
        StorageError: the workspace cannot be made.
    """
    source = model if isinstance(model, Source) else open_source(model, name, revision)
    job = describe_job(source, out, options, calibration)
    if is_committed(job):
        return job
    check_files(source.directory, ModelError)
    validate_coupling(source.config())
    with writing(job.work):
        make_directory(job.work)
    if calibration is not None and not (job.work / CALIBRATION).is_file():
        save_tensors(job.work / CALIBRATION, {"ids": calibration})
    return job


def describe_job(
    source: Source, out: str | Path, options: PruneOptions, calibration: torch.Tensor | None = None
) -> PruneJob:
    """Check a job and name its files; nothing is written.

    Args:
        source: the full model.
        out: directory to be made; one that holds the result of the same job is fine.
        calibration: token ids [N, T] (int64, no padding) for the criteria that look at data.

    Raises:
        ModelError: unknown architecture, or pruned source.
        RecipeError: options that leave nothing of a layer.
        DataError: calibration missing, superfluous or out of the vocabulary.
    """
    config = source.config()
    if counts_of(config):
        raise ModelError(f"model.name: {source.name} is pruned already; prune the full model")
    plan = plan_pruning(config, options)
    _check_calibration(calibration, options, config)
    return PruneJob(
        source,
        plan.coupling,
        options,
        plan.counts,
        tuple(plan.pruned_layers),
        str(Path(out).absolute()),
        job_key(source, options, calibration),
        _sha256(calibration),
    )


def is_committed(job: PruneJob) -> bool:
    """Say whether the result is there.

    Raises:
        ModelError: something else is there.
    """
    out = Path(job.out)
    if not out.exists():
        return False
    if not (out / MANIFEST).is_file():
        difference = f"it holds no {MANIFEST}"
    elif (manifest := read_manifest(out)).key != job.key:
        difference = f"it was pruned from {manifest.source['name']} with {dict(manifest.options)}"
    else:
        return True
    raise ModelError(f"{out} is not the result of this job: {difference}; give another directory or remove it")


def _check_calibration(calibration: torch.Tensor | None, options: PruneOptions, config: Any) -> None:
    if not options.needs_calibration:
        if calibration is not None:
            raise DataError(f"calibration: criterion {options.criterion} looks at no data; leave it out")
        return
    if calibration is None:
        what = "refit: true" if options.refit else f"criterion {options.criterion}"
        raise DataError(f"calibration: {what} needs token ids; give some, such as 10 x 64")
    if calibration.dtype != torch.int64 or calibration.dim() != 2 or min(calibration.shape) < 1:
        raise DataError(
            f"calibration: {calibration.dtype} {list(calibration.shape)} is not a matrix of int64 token ids; "
            "give one row for each text"
        )
    if calibration.shape[1] < 2:
        raise DataError("calibration: texts of one token have no next token to predict; give at least two")
    vocabulary = config.vocab_size
    if int(calibration.min()) < 0 or int(calibration.max()) >= vocabulary:
        raise DataError(f"calibration: it holds ids outside [0, {vocabulary}); use the tokenizer of the model")


def shard_name(job: PruneJob, layer: int | None) -> str:
    """File of one layer of the result, or (None) of what is outside the layers."""
    last = job.coupling.num_layers + 1
    return f"model-{last if layer is None else layer + 1:05d}-of-{last:05d}.safetensors"


def shard_names(job: PruneJob) -> list[str]:
    """Files of the result's weights: layer by layer, then what is outside of them."""
    return [shard_name(job, layer) for layer in [*range(job.coupling.num_layers), None]]


def write_shard(
    job: PruneJob,
    file: str,
    entries: Mapping[str, Entry],
    specs: Mapping[str, Spec],
    make: Callable[[str], torch.Tensor],
    kept: Mapping[str, list[int]] | None,
) -> None:
    """Write one shard of the result, under the tensor names of the source's files.

    Args:
        entries: name in the model -> place in the source.
        specs: name in the model -> what ``make`` returns for it.
        kept: group -> kept units, stored in the shard so that it needs no other record.

    Raises:
        StorageError: it cannot be written.
    """
    names = {entry.key: name for name, entry in entries.items()}
    tag = json.dumps({"key": job.key, "kept": kept}, separators=(",", ":"))
    by_key = {key: specs[name] for key, name in names.items()}
    write_tensors(
        job.workspace / file, by_key, lambda key: make(names[key]), {_TAG: tag}, sha256_at=sha256_of(job, file)
    )


def sha256_of(job: PruneJob, file: str) -> Path:
    """Return where the digest of a shard is kept until all are written."""
    return job.work / f"{file}.sha256"


def read_shard(
    job: PruneJob, file: str, directory: Directory | None = None
) -> tuple[dict[str, list[int]] | None, dict[str, Entry]] | None:
    """Return kept units (None of a whole layer) and tensors of a shard that this job wrote; None if it has not.

    Args:
        directory: holds the shards; by default the job's workspace.
    """
    directory = directory or job.workspace
    if not (directory / file).is_file():
        return None
    metadata, entries = read_header(directory, file)
    where, cure = f"{directory / file}: {_TAG}", "delete the file"
    tag = as_object(parse(metadata.get(_TAG, "{}"), where, ModelError, cure), where, ModelError, cure)
    return (tag["kept"], entries) if tag.get("key") == job.key else None


def commit(job: PruneJob) -> Manifest:
    """Make the result of a job whose steps are all done appear.

    Raises:
        ModelError: a shard is missing.
        StorageError: the result cannot be written.
    """
    if is_committed(job):
        return read_manifest(job.out)
    digests = {}
    for file in shard_names(job):
        if sha256_of(job, file).is_file():  # an earlier version kept none: the shard is read below
            digests[file] = sha256_of(job, file).read_text(errors="replace").strip('"\n')
    describe(job, job.workspace, job.workspace)
    with writing(job.out, then="run the same command again: finished layers are not repeated"):
        shutil.rmtree(job.work, ignore_errors=True)
        for left in job.workspace.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        write_checksums(job.workspace, digests)
        _appear(job)
    return read_manifest(job.out)


def describe(job: PruneJob, directory: Path, shards_at: Directory) -> None:
    """Write into a directory all of a job's result but its shards: config, index, tokenizer and manifest.

    Args:
        shards_at: holds the shards.

    Raises:
        ModelError: a shard is missing.
        StorageError: a file cannot be written.
    """
    kept, weight_map, files, total_bytes = {}, {}, {}, 0
    for layer, file in zip([*range(job.coupling.num_layers), None], shard_names(job), strict=True):
        shard = read_shard(job, file, shards_at)
        if shard is None:
            raise ModelError(f"{shards_at / file} is missing: run the steps of this job before it is committed")
        if layer is not None and shard[0] is not None:
            kept[layer] = shard[0]
        weight_map.update(dict.fromkeys(shard[1], file))
        files[file] = (shards_at / file).stat().st_size
        total_bytes += sum(entry.num_bytes for entry in shard[1].values())
    source = {"name": job.source.name, "revision": job.source.revision, "identity": dict(job.source.identity)}
    manifest = Manifest(
        job.key, dataclasses.asdict(job.options), job.coupling.model_type, source, job.calibration, kept, files
    )
    write_json(directory / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    with writing(directory, then="run the same command again: finished layers are not repeated"):
        config = job.source.config()
        (with_counts(config, job.counts) if job.counts else config).save_pretrained(directory)
        for path in sorted(Path(job.source.directory).iterdir()):
            if path.is_file() and path.name.startswith(_COPIED) and not leads_out(path, Path(job.source.directory)):
                shutil.copyfile(path, directory / path.name)
        manifest.write(directory)


def _appear(job: PruneJob) -> None:
    try:
        job.workspace.rename(job.out)
        sync_directory(Path(job.out).parent)
    except OSError:
        if not Path(job.out).exists() or not is_committed(job):  # else another process finished the same job first
            raise

"""Pruning as a list of small steps, each a function from files to files.

A step may run in any process that sees the same directories, may run twice, and is skipped where its result is there:
so a job goes on where it was killed, and its files come out bit for bit the same. ``after`` names the steps whose
results a step reads; all else may run at once. What no step ever holds is more than one decoder layer.

| structure and criterion | steps |
|---|---|
| any | ``rest``: what is outside the layers; ``layer-i``: one layer, pruned or whole; then :func:`commit` |
| units: taylor | ``embed``, ``forward-0..``, ``loss``, ``..backward-i`` (scores), ``layer-i`` |
| units: wanda | ``embed``, ``forward-0..`` (scores), ``layer-i`` |
| units: random, magnitude | with ``refit`` as wanda, without scores |
| zeros: wanda, sparsegpt | ``embed``, ``forward-0..``, then ``mask-i``: layer i sees what pruned layers give |
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from raymem.methods.loram.index_map import take
from raymem.methods.loram.pruning import layer_passes
from raymem.methods.loram.pruning.job import CALIBRATION, PruneJob, is_committed, read_shard, shard_name, write_shard
from raymem.methods.loram.pruning.layerwise import LayerwiseModel
from raymem.methods.loram.pruning.masks import magnitude_mask
from raymem.methods.loram.pruning.refit import readers
from raymem.storage.safetensors_io import DTYPES, Entry, Spec, write_json

Kind = Literal["rest", "layer", "embed", "forward", "loss", "backward", "mask"]


@dataclass(frozen=True)
class Step:
    """One piece of work of a job."""

    kind: Kind
    layer: int = 0
    after: tuple[str, ...] = ()
    """Names of the steps that must be done before."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.layer}" if self.kind in ("layer", "forward", "backward", "mask") else self.kind


def steps(job: PruneJob) -> list[Step]:
    """Return all steps of a job in an order that respects ``after``."""
    pruned, options = job.pruned_layers, job.options
    all_steps = [Step("rest")]
    if options.needs_calibration and pruned:
        all_steps.append(Step("embed"))
        all_steps += _taylor_steps(job) if options.criterion == "taylor" else _forward_steps(job)
    by_name = {step.name for step in all_steps}
    for layer in range(job.coupling.num_layers):
        if f"mask-{layer}" not in by_name:
            scored = f"{'backward' if options.criterion == 'taylor' else 'forward'}-{layer}"
            needs_scores = options.needs_calibration and layer in pruned
            all_steps.append(Step("layer", layer, (scored,) if needs_scores else ()))
    return all_steps


def _taylor_steps(job: PruneJob) -> list[Step]:
    layers, first = job.coupling.num_layers, job.pruned_layers[0]
    forward = [Step("forward", i, ("embed" if i == 0 else f"forward-{i - 1}",)) for i in range(layers)]
    forward.append(Step("loss", after=(f"forward-{layers - 1}",)))
    for i in range(layers - 1, first - 1, -1):
        forward.append(Step("backward", i, ("loss" if i == layers - 1 else f"backward-{i + 1}",)))
    return forward


def _forward_steps(job: PruneJob) -> list[Step]:
    passes: list[Step] = []
    previous = "embed"
    for i in range(job.pruned_layers[-1] + 1):
        kind: Kind = "mask" if job.options.structure != "units" and i in job.pruned_layers else "forward"
        passes.append(Step(kind, i, (previous,)))
        previous = passes[-1].name
    return passes


def run_step(job: PruneJob, step: Step, model: LayerwiseModel | None = None) -> None:
    """Do one step, or nothing if it is done.

    Args:
        model: :func:`layerwise_model` of the job, to be shared by the steps of one process; by default a new one where
            the step needs it.

    Raises:
        ModelError: a shard of the source is damaged.
        StorageError: a result cannot be written.
    """
    if is_done(job, step):
        return
    if step.kind == "rest":
        entries = job.source.rest(job.coupling)
        write_shard(job, shard_name(job, None), entries, _as_stored(entries), job.source.read, None)
    elif step.kind == "layer":
        _write_layer(job, step.layer)
    else:
        _sweep(job, step, model or layerwise_model(job))
        write_json(_marker(job, step), step.name)
        layer_passes.remove_used(job, step.kind, step.layer)
    _return_freed_memory()


def _sweep(job: PruneJob, step: Step, model: LayerwiseModel) -> None:
    match step.kind:
        case "embed":
            layer_passes.embed(job, model)
        case "forward":
            layer_passes.forward(job, model, step.layer)
        case "loss":
            layer_passes.loss(job, model)
        case "backward":
            layer_passes.backward(job, model, step.layer)
        case "mask":
            layer_passes.mask(job, model, step.layer)


def _return_freed_memory() -> None:
    """glibc keeps what was freed in blocks below 32 MB, in pieces: after twenty layers a worker held ten of them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def is_done(job: PruneJob, step: Step) -> bool:
    """Say whether the results of a step are there, whole: in the workspace, or in the committed result."""
    if not job.workspace.is_dir() and is_committed(job):
        return True
    if step.kind in ("rest", "layer"):
        return read_shard(job, result_of(job, step)) is not None
    return _marker(job, step).is_file()


def reads(job: PruneJob, step: Step) -> list[str]:
    """Return the files in the job's ``work`` directory that a step reads."""
    layer, last = step.layer, job.coupling.num_layers
    match step.kind:
        case "rest":
            return []
        case "layer":
            if layer not in job.counts:
                return []
            files = [f"scores-{layer}"] if job.options.ranks_by_data else []
            files += [f"refitted-{layer}"] if job.options.refit else []
        case "embed":
            files = []
        case "forward" | "mask":
            files = [f"hidden-{layer}"]
        case "loss":
            files = [f"hidden-{last}"]
        case "backward":
            files = [f"hidden-{layer}", f"gradient-{layer + 1}"]
    of_texts = [] if step.kind == "layer" else [CALIBRATION]
    return [*of_texts, *(f"{name}.safetensors" for name in files)]


def memory_bytes(job: PruneJob, step: Step) -> int:
    """About what a step holds at most beside the libraries: for whoever decides how many run on one machine."""
    prefix = job.coupling.prefix(step.layer)
    stored = {name: entry.num_bytes for name, entry in job.source.tensors.items()}
    rest = sum(size for name, size in stored.items() if job.coupling.locate(name) is None)
    layer = sum(size for name, size in stored.items() if name.startswith(prefix))
    widest = max(stored.values())
    if step.kind == "rest":
        return widest
    if step.kind == "layer":
        return int((1.4 if job.options.criterion == "magnitude" else 0.5) * layer) + widest
    if step.kind in ("embed", "loss"):
        return 2 * rest + widest  # fp32 of what is stored in bf16
    gram_bytes = 0
    if job.options.refit or job.options.criterion == "sparsegpt":
        observed = readers(job.coupling) if job.options.refit else job.coupling.linears
        inputs = [job.source.tensors[f"{prefix}{path}.weight"].shape[1] for path in observed]
        gram_bytes = 4 * (sum(size**2 for size in inputs) + (4 if job.options.refit else 3) * max(inputs) ** 2)
    return int((4.4 if step.kind == "backward" else 2.4) * layer) + widest + gram_bytes


def layerwise_model(job: PruneJob, device: torch.device | str = "cpu") -> LayerwiseModel:
    """Return the model that the steps of a calibrated criterion compute with.

    Raises:
        ModelError: the calibration file of the job is missing.
    """
    return LayerwiseModel(job.source, layer_passes.calibration(job).shape[1], device)


def result_of(job: PruneJob, step: Step) -> str:
    """Return the file that a step writes last: a shard of the result, or a note in ``work``."""
    if step.kind in ("rest", "layer"):
        return shard_name(job, step.layer if step.kind == "layer" else None)
    return f"done-{step.name}.json"


def _marker(job: PruneJob, step: Step) -> Path:
    return job.work / result_of(job, step)


def _write_layer(job: PruneJob, layer: int) -> None:
    """Prune or copy one layer: it is read once, and beside it only what was fitted and one more tensor of the result
    exist at a time.
    """
    entries = job.source.layer(job.coupling, layer)
    if job.options.structure != "units":
        _write_zeroed(job, layer, entries)
        return
    held: dict[str, torch.Tensor] = {}
    kept: dict[str, list[int]] | None = None
    if layer in job.counts:
        if job.options.criterion == "magnitude":
            held = {name: job.source.read(name) for name in entries}
        prefix = job.coupling.prefix(layer)
        weights = {path: held[f"{prefix}{path}.weight"] for path in job.coupling.linears} if held else {}
        kept = layer_passes.choose(job, layer, weights)
    fitted = layer_passes.fitted(job, layer)
    specs = _as_stored(entries)
    if kept is not None:
        for name, spec in specs.items():
            hollow = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            specs[name] = Spec(tuple(take(job.coupling, {layer: kept}, name, hollow).shape), spec.dtype)

    def make(name: str) -> torch.Tensor:
        if name in fitted:
            return fitted.pop(name)
        tensor = held.pop(name) if name in held else job.source.read(name)
        return tensor if kept is None else take(job.coupling, {layer: kept}, name, tensor)

    write_shard(job, shard_name(job, layer), entries, specs, make, kept)


def _write_zeroed(job: PruneJob, layer: int, entries: dict[str, Entry]) -> None:
    """Write one layer with zeros by magnitude, or as it is."""
    ratio = job.options.ratio_of(layer, job.coupling.num_layers)
    masked = {f"{job.coupling.prefix(layer)}{path}.weight" for path in job.coupling.linears} if ratio else set()

    def make(name: str) -> torch.Tensor:
        tensor = job.source.read(name)
        return tensor * magnitude_mask(tensor, job.options.structure, ratio) if name in masked else tensor

    write_shard(job, shard_name(job, layer), entries, _as_stored(entries), make, None)


def _as_stored(entries: dict[str, Entry]) -> dict[str, Spec]:
    return {name: Spec(entry.shape, DTYPES[entry.dtype]) for name, entry in entries.items()}

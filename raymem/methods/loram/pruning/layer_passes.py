"""Calibration, layer by layer: activations forward, gradients backward, statistics and scores on the way.

Files in the job's ``work`` directory, all fp32 and keyed by text: ``hidden-i`` is what layer i is called with,
``gradient-i`` the gradient of the loss with respect to it, ``scores-i`` the scores of its units, ``refitted-i`` the
weights that were fitted to the units that stay.

Legend: N texts, n of them, T tokens, H hidden size, I inputs of a linear layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from raymem.errors import ModelError
from raymem.methods.loram.index_map import place
from raymem.methods.loram.pruning.job import CALIBRATION, PruneJob, shard_name, write_shard
from raymem.methods.loram.pruning.layerwise import LayerwiseModel
from raymem.methods.loram.pruning.masks import sparsegpt, wanda_mask
from raymem.methods.loram.pruning.refit import readers, refitted
from raymem.methods.loram.pruning.scores import (
    best,
    magnitude_scores,
    random_scores,
    taylor_scores,
    wanda_scores,
)
from raymem.storage.safetensors_io import DTYPES, Spec, read_header, read_tensor, save_tensors, write_tensors

_BATCH_TOKENS = 1024


def calibration(job: PruneJob) -> torch.Tensor:
    """Token ids [N, T] of the job."""
    return _read(job.work, CALIBRATION, "ids")


def scores(job: PruneJob, layer: int) -> dict[str, torch.Tensor]:
    """Group -> scores in fp64 that a sweep stored for a layer."""
    file = f"scores-{layer}.safetensors"
    return {group.name: _read(job.work, file, group.name) for group in job.coupling.groups}


def choose(job: PruneJob, layer: int, weights: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Return the units of a layer that stay, by the criterion.

    Args:
        weights: path of a linear layer -> weight; for the criterion ``magnitude``.

    Raises:
        ModelError: scores that are not finite.
    """
    stored = scores(job, layer) if job.options.ranks_by_data else {}
    kept = {}
    for group in job.coupling.groups:
        match job.options.criterion:
            case "random":
                scores_U = random_scores(group, layer, job.options.seed)
            case "magnitude":
                scores_U = magnitude_scores(group, weights)
            case _:
                scores_U = stored[group.name]
        if not bool(torch.isfinite(scores_U).all()):
            raise ModelError(
                f"layer {layer}: its {group.name} scores are not finite; the weights or the calibration texts hold "
                "NaN or infinity: check the model"
            )
        kept[group.name] = best(scores_U, job.counts[layer][group.name])
    return kept


def fitted(job: PruneJob, layer: int) -> dict[str, torch.Tensor]:
    """Return the weights of a pruned layer that were fitted, by their names in the model; none without ``refit``."""
    if not job.options.refit or layer not in job.counts:
        return {}
    file = f"refitted-{layer}.safetensors"
    return {name: _read(job.work, file, name) for name in read_header(job.work, file)[1]}


def embed(job: PruneJob, model: LayerwiseModel) -> None:
    """Write ``hidden-0``."""
    ids_NT = calibration(job)
    _write_texts(job, "hidden-0", lambda texts: model.embed(ids_NT[texts.start : texts.stop]))
    model.drop_rest()


def forward(job: PruneJob, model: LayerwiseModel, layer: int) -> None:
    """Write ``hidden-(layer + 1)``; of a layer that is to be pruned also scores if the criterion is Wanda, and, unless
    that is for the way back, what is fitted.
    """
    module = model.load_layer(layer)
    observe = layer in job.counts and job.options.criterion == "wanda"
    statistics = _SquareSums(module, job.coupling.linears if observe else ())
    grams = _grams(job, layer, module) if job.options.criterion != "taylor" else None
    with torch.no_grad(), statistics, grams or contextlib.nullcontext():
        _write_texts(
            job, f"hidden-{layer + 1}", lambda texts: model.run_layer(layer, _texts(job, f"hidden-{layer}", texts))
        )
    if observe:
        weights = {path: _linear(module, path).weight.cpu() for path in job.coupling.linears}
        square_sums = {path: sums.cpu() for path, sums in statistics.sums.items()}
        scores = {group.name: wanda_scores(group, weights, square_sums) for group in job.coupling.groups}
        save_tensors(job.work / f"scores-{layer}.safetensors", scores)
    if grams is not None:
        _fit(job, layer, module, grams)
    model.drop_layer(layer)


def loss(job: PruneJob, model: LayerwiseModel) -> None:
    """Write the gradient of the mean loss over all texts with respect to the last layer's output."""
    ids_NT, last = calibration(job), job.coupling.num_layers

    def gradient(texts: range) -> torch.Tensor:
        return model.loss_gradient(_texts(job, f"hidden-{last}", texts), ids_NT[texts.start]) / len(ids_NT)

    one_by_one = [range(text, text + 1) for text in range(len(ids_NT))]  # logits are the largest activations of all
    _write_texts(job, f"gradient-{last}", gradient, one_by_one)
    model.drop_rest()


def backward(job: PruneJob, model: LayerwiseModel, layer: int) -> None:
    """Recompute a layer and push the gradient through it: write ``gradient-layer``, and scores if it is to be pruned.

    Summed over the texts before absolute values are taken, so the scores are those of a backward pass of the whole
    model over the whole set.
    """
    module = model.load_layer(layer)
    scored = layer in job.counts
    linears = {path: _linear(module, path) for path in job.coupling.linears}
    for linear in linears.values():
        linear.weight.requires_grad_(scored)
    grams = _grams(job, layer, module)

    def gradient(texts: range) -> torch.Tensor:
        hidden_nTH = _texts(job, f"hidden-{layer}", texts).to(model.device).requires_grad_(True)
        after_nTH = _texts(job, f"gradient-{layer + 1}", texts).to(model.device)
        model.run_layer(layer, hidden_nTH).backward(after_nTH)  # type: ignore[no-untyped-call]
        assert hidden_nTH.grad is not None
        return hidden_nTH.grad

    with grams or contextlib.nullcontext():
        _write_texts(job, f"gradient-{layer}", gradient)
    if scored:
        weights = {path: linear.weight.detach().cpu() for path, linear in linears.items()}
        gradients = {
            path: linear.weight.grad.cpu() for path, linear in linears.items() if linear.weight.grad is not None
        }
        scores = {group.name: taylor_scores(group, weights, gradients) for group in job.coupling.groups}
        save_tensors(job.work / f"scores-{layer}.safetensors", scores)
    if grams is not None:
        _fit(job, layer, module, grams)
    model.drop_layer(layer)


def _grams(job: PruneJob, layer: int, module: nn.Module) -> _GramSums | None:
    """Return what observes the inputs that the kept units are fitted on, if this layer is fitted."""
    if not job.options.refit or layer not in job.counts:
        return None
    return _GramSums(module, readers(job.coupling))


@torch.no_grad()
def _fit(job: PruneJob, layer: int, module: nn.Module, grams: _GramSums) -> None:
    """Write ``refitted-layer``."""
    prefix = job.coupling.prefix(layer)
    kept = choose(job, layer, {path: _linear(module, path).weight.cpu() for path in job.coupling.linears})
    stored = job.source.layer(job.coupling, layer)
    num_tokens, found = calibration(job).numel(), {}
    for path in readers(job.coupling):
        columns = place(job.coupling, {layer: kept}, f"{prefix}{path}").columns
        assert columns is not None
        weight_OK = refitted(_linear(module, path).weight, grams.sums.pop(path), columns.indices_K, num_tokens)
        found[f"{prefix}{path}.weight"] = weight_OK.to("cpu", DTYPES[stored[f"{prefix}{path}.weight"].dtype])
    save_tensors(job.work / f"refitted-{layer}.safetensors", found)


def mask(job: PruneJob, model: LayerwiseModel, layer: int) -> None:
    """Write one layer with zeros by Wanda or SparseGPT, and what the zeroed layer gives as ``hidden-(layer + 1)``.

    Statistics are those of the dense layer on the outputs of the pruned layers before it, as in both authors' codes.
    """
    module, prefix = model.load_layer(layer), job.coupling.prefix(layer)
    linears = job.coupling.linears
    statistics = (_GramSums if job.options.criterion == "sparsegpt" else _SquareSums)(module, linears)
    with torch.no_grad(), statistics:
        for texts in _batches(job):
            model.run_layer(layer, _texts(job, f"hidden-{layer}", texts))
    ratio = job.options.ratio_of(layer, job.coupling.num_layers)
    entries = job.source.layer(job.coupling, layer)

    def make(name: str) -> torch.Tensor:
        tensor = job.source.read(name)
        path, _, parameter = name.removeprefix(prefix).rpartition(".")
        if path not in linears or parameter != "weight":
            return tensor
        sums, structure = statistics.sums.pop(path), job.options.structure
        if job.options.criterion == "sparsegpt":
            tensor = sparsegpt(tensor.to(model.device), sums, structure, ratio).to("cpu", tensor.dtype)
        else:
            tensor = tensor * wanda_mask(tensor, sums.cpu(), structure, ratio)
        _linear(module, path).weight.copy_(tensor)
        return tensor

    specs = {name: Spec(entry.shape, DTYPES[entry.dtype]) for name, entry in entries.items()}
    with torch.no_grad():
        write_shard(job, shard_name(job, layer), entries, specs, make, None)
        _write_texts(
            job, f"hidden-{layer + 1}", lambda texts: model.run_layer(layer, _texts(job, f"hidden-{layer}", texts))
        )
    model.drop_layer(layer)


def remove_used(job: PruneJob, kind: str, layer: int) -> None:
    """Remove what no step after this one reads."""
    used = []
    if kind == "mask" or (kind == "forward" and job.options.criterion != "taylor"):
        used = [f"hidden-{layer}"]
    elif kind == "backward":
        used = [f"hidden-{layer + 1}", f"gradient-{layer + 1}"]
    for name in used:
        (job.work / f"{name}.safetensors").unlink(missing_ok=True)


class _Statistics:
    """Context manager that sums something over all inputs of some linear layers of a module."""

    def __init__(self, module: nn.Module, paths: tuple[str, ...]) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self._module, self._paths = module, paths
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for path in self._paths:
            hook = lambda module, inputs, path=path: self._see(path, inputs[0])  # noqa: E731
            self._hooks.append(self._module.get_submodule(path).register_forward_pre_hook(hook))

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, path: str, inputs: torch.Tensor) -> None:
        statistic = self._of(inputs.detach().reshape(-1, inputs.shape[-1]))
        self.sums[path] = self.sums[path] + statistic if path in self.sums else statistic

    def _of(self, inputs_TI: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class _SquareSums(_Statistics):
    """Sums of squares [I] in fp64."""

    def _of(self, inputs_TI: torch.Tensor) -> torch.Tensor:
        return inputs_TI.double().square().sum(0)


class _GramSums(_Statistics):
    """Sums of outer products [I, I] in fp32."""

    def _of(self, inputs_TI: torch.Tensor) -> torch.Tensor:
        return inputs_TI.T @ inputs_TI


def _linear(module: nn.Module, path: str) -> nn.Linear:
    linear = module.get_submodule(path)
    assert isinstance(linear, nn.Linear), path
    return linear


def _key(text: int) -> str:
    return f"{text:06d}"


def _texts(job: PruneJob, name: str, texts: range) -> torch.Tensor:
    """Some texts [n, T, H] of a file in ``work``."""
    _, entries = read_header(job.work, f"{name}.safetensors")
    return torch.stack([read_tensor(job.work, entries[_key(text)]) for text in texts])


def _read(directory: Path, file: str, key: str) -> torch.Tensor:
    _, entries = read_header(directory, file)
    return read_tensor(directory, entries[key])


def _batches(job: PruneJob) -> list[range]:
    """Return texts that go through a layer together: their activations stay small beside its weights."""
    count, length = calibration(job).shape
    size = max(1, _BATCH_TOKENS // length)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _write_texts(
    job: PruneJob, name: str, make: Callable[[range], torch.Tensor], batches: list[range] | None = None
) -> None:
    """Write one tensor [T, H] for every text; ``make`` computes a batch [n, T, H] when its first text is written."""
    length, hidden = calibration(job).shape[1], job.source.config().hidden_size
    batches = batches or _batches(job)
    by_key = {_key(text): batch for batch in batches for text in batch}
    computed: dict[str, torch.Tensor] = {}

    def take(key: str) -> torch.Tensor:
        if key not in computed:
            found_nTH = make(by_key[key]).detach().float().cpu()
            computed.update(zip(map(_key, by_key[key]), found_nTH, strict=True))
        return computed.pop(key)

    specs = {key: Spec((length, hidden), torch.float32) for key in by_key}
    write_tensors(job.work / f"{name}.safetensors", specs, take, {})

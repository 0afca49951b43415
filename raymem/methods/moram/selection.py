"""Choosing the connections: the gradient of one matrix at a time, summed over calibration batches.

The gradient of a weight is gy^T x, from the gradient of its layer's output and the layer's input. It is taken there, by
a listener on the output, and not from ``weight.grad``: quantised and sharded weights have none, and no parameter needs
to be made trainable. A sum over batches must be held until the last one, so the layers go in groups of bounded size,
last layers first (backward then ends at the lowest layer of the group); every group sees all batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raymem.errors import AdapterError
from raymem.memory.target import worth_visiting
from raymem.methods.moram.base import fingerprint, gathered_weight
from raymem.methods.moram.config import Criterion
from raymem.methods.moram.indices import rows_at_once, top_columns
from raymem.methods.moram.layer import MoRAMLinear, check_bases, layers
from raymem.seeds import derive, generator

# T tokens, O outputs, I inputs, K connections per row

Loss = Callable[[nn.Module, Any], torch.Tensor]
"""Given the model and a batch, returns the loss to differentiate."""

_GROUPS = 12
_LEAST_GROUP_BYTES = 1 << 22


def select_indices(
    model: nn.Module,
    batches: Iterable[Any] = (),
    *,
    criterion: Criterion = "gradient",
    loss: Loss | None = None,
    group_bytes: int | None = None,
    adapter_name: str = "default",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda number, count: None,
) -> dict[str, torch.Tensor]:
    """Choose the connections of a MoRAM adapter and put them into its layers. Collective if there is a process group.

    Args:
        model: with the adapter attached; its training mode, checkpointing and weights stay as they are, and no
            gradient is left in any parameter.
        batches: keyword dicts for the model's forward, with what makes it return a loss; on its device. Each rank of
            a process group gives its own.
        criterion: ``gradient``: |sum of the gradients over all batches and ranks|; ``absolute_gradient``: sum of
            |gradient|, per use of a layer; ``magnitude``: |weight|; ``random``. The last two take no batches.
        loss: replaces ``model(**batch).loss``.
        group_bytes: most that the held sums may take, at least one matrix; by default a twelfth of all of them (4 MiB
            or more). Twice the bytes, half the passes over the batches.
        seed: for ``random``, and for dropout during the passes.
        progress: told, as each group of layers begins, its number from 1 and how many there are.

    Returns:
        layer name -> int32 [O, K], ascending within a row; of equal scores the leftmost inputs. Equal on all ranks.

    Raises:
        AdapterError: no such adapter, no batches, no loss, or a layer whose gradient is zero or not finite (named);
            then nothing was changed.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    named_layers = layers(model, adapter_name)
    if not named_layers:
        raise AdapterError(
            f"{type(model).__name__} has no MoRAM adapter {adapter_name!r}; attach one first: "
            "peft.get_peft_model(model, MoRAMConfig(...))"
        )
    if criterion == "magnitude":
        chosen = {name: _largest_weights(layer, name, adapter_name) for name, layer in named_layers}
    elif criterion == "random":
        chosen = {name: _random_columns(layer, name, adapter_name, seed) for name, layer in named_layers}
    elif criterion in ("gradient", "absolute_gradient"):
        stored_batches = list(batches)
        if not stored_batches:
            raise AdapterError(f"batches: there are none, and criterion {criterion!r} needs gradients; give some")
        absolute = criterion == "absolute_gradient"
        chosen = {}
        groups = [*_groups(named_layers, group_bytes)]
        for number, group in enumerate(groups, 1):
            progress(number, len(groups))
            listeners = {name: _Listener(layer, absolute=absolute) for name, layer in group}
            _listen(model, listeners, stored_batches, loss or _model_loss, seed)
            for name, layer in group:
                chosen[name] = _best(listeners.pop(name).score_OI, layer.moram_index[adapter_name].shape[1], name)
        chosen = {name: chosen[name] for name, _ in named_layers}
    else:
        raise AdapterError(f"criterion: {criterion!r} is not one of gradient, absolute_gradient, magnitude, random")
    for name, layer in named_layers:
        layer.set_selection(adapter_name, chosen[name], fingerprint(layer.get_base_layer()))
    return chosen


def rehearse_selection(
    model: nn.Module, batch: Any, *, loss: Loss | None = None, adapter_name: str = "default", seed: int = 0
) -> None:
    """Take the part of a choice by gradients that holds the most memory, for a plan of it; nothing is chosen.

    That part is the group of layers with the largest sums, with one batch. It looks at no value, so that model and
    batch may be fake tensors.

    Args:
        batch, loss, adapter_name, seed: as for :func:`select_indices`.
    """
    groups = _groups(layers(model, adapter_name), None)
    largest = max(groups, key=lambda group: sum(layer.out_features * layer.in_features for _, layer in group))
    listeners = {name: _Listener(layer, absolute=False) for name, layer in largest}
    _listen(model, listeners, [batch], loss or _model_loss, seed)


def mark_selected(model: nn.Module, adapter_name: str = "default") -> None:
    """Say that the index buffers were filled from outside, by a checkpoint.

    Raises:
        AdapterError: they were not.
    """
    for _, layer in layers(model, adapter_name):
        layer.mark_selected(adapter_name)


def check_base(model: nn.Module, adapter_name: str = "default") -> None:
    """Check that the base weights are those that the connections were selected for. Collective for sharded weights.

    Raises:
        AdapterError: names the first layer whose weight is another.
    """
    named_layers = layers(model, adapter_name)
    check_bases({name: layer.moram_base[adapter_name] for name, layer in named_layers}, named_layers)


def _groups(
    named_layers: Sequence[tuple[str, MoRAMLinear]], group_bytes: int | None
) -> Iterator[list[tuple[str, MoRAMLinear]]]:  # fmt: skip
    """Return the layers from the last to the first, in groups whose sums fit into the limit."""
    sizes = {name: 4 * layer.out_features * layer.in_features for name, layer in named_layers}
    limit = max(_LEAST_GROUP_BYTES, sum(sizes.values()) // _GROUPS) if group_bytes is None else group_bytes
    group: list[tuple[str, MoRAMLinear]] = []
    held = 0
    for name, layer in reversed(named_layers):
        if group and held + sizes[name] > limit:
            yield group
            group, held = [], 0
        group.append((name, layer))
        held += sizes[name]
    yield group


def _listen(
    model: nn.Module, listeners: Mapping[str, _Listener], batches: Sequence[Any], loss: Loss, seed: int
) -> None:
    """Pass all batches forward and backward while some layers are listened to."""
    everything = layers(model)
    with _only_listening(model):
        try:
            for name, layer in everything:
                layer.tap = listeners.get(name, _deaf)
            for number, batch in enumerate(batches):
                torch.manual_seed(derive(seed, "selection", number))  # every group meets the same dropout
                with torch.enable_grad():
                    torch.autograd.backward(loss(model, batch))
        finally:
            for _, layer in everything:
                layer.tap = None


def _deaf(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Stand in the place of a listener, for layers of other groups."""
    return y


def _best(score_OI: torch.Tensor, k: int, name: str) -> torch.Tensor:
    """Return columns of highest score over all ranks. Collective.

    Raises:
        AdapterError: a gradient that cannot rank anything.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(score_OI)
    total = float(score_OI.abs_().sum(dtype=torch.float64))
    if not math.isfinite(total):
        raise AdapterError(
            f"{name}: its gradient over the calibration batches is not finite; look at the batches and the weights, or "
            "compute in fp32 or bf16"
        )
    if total == 0.0:
        raise AdapterError(
            f"{name}: its gradient over the calibration batches is zero, which ranks no connection; give batches that "
            "reach this layer (with labels), or leave it out of the targets"
        )
    return top_columns(score_OI, k)


@contextmanager
def _only_listening(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient, and the global random stream is as before afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    devices = {parameter.device for parameter in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


class _Listener:
    """Sums gy^T x over the uses of one layer, by chunks of rows."""

    def __init__(self, layer: MoRAMLinear, *, absolute: bool) -> None:
        device = layer.moram_index[next(iter(layer.moram_index))].device
        self.score_OI = torch.zeros(layer.out_features, layer.in_features, device=device)
        self._absolute = absolute
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        heard: torch.Tensor = _Listen.apply(y, x.detach(), self._anchor, self)  # type: ignore[no-untyped-call]
        return heard

    def add(self, grad_y: torch.Tensor, x: torch.Tensor) -> None:
        """Take, in backward, a layer's output gradient [..., O] and input [..., I]."""
        grad_TO, x_TI = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1]).to(grad_y.dtype)
        step = rows_at_once(self.score_OI[0].nbytes, 1 << 20)
        for start in worth_visiting(range(0, self.score_OI.shape[0], step)):
            rows = slice(start, start + step)
            gradient_CI = grad_TO[:, rows].mT @ x_TI
            self.score_OI[rows] += gradient_CI.abs_() if self._absolute else gradient_CI


class _Listen(torch.autograd.Function):
    """The identity on a layer's output, whose backward tells a listener; the anchor makes it part of every graph."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, listener: _Listener) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.listener = listener
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            ctx.listener.add(grad_y, *ctx.saved_tensors)
        return grad_y if ctx.needs_input_grad[0] else None, None, None, None


def _model_loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss that a model's forward returns: ``.loss``, ``["loss"]``, or the output if it is a number."""
    output: Any = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise AdapterError(
            f"batches: the model returned no loss for a batch with {', '.join(batch)}; add labels to every batch, or "
            "give select_indices a loss function"
        )
    return loss


@torch.no_grad()
def _largest_weights(layer: MoRAMLinear, layer_name: str, adapter_name: str) -> torch.Tensor:
    """Return columns of largest |weight|, of a readable weight of any kind."""
    module: Any = layer.get_base_layer()
    base = gathered_weight(module)
    if base.weight is None:
        raise AdapterError(
            f"{layer_name}: the weight of {type(module).__name__} cannot be read; use criterion: gradient or random"
        )
    index_OK = layer.moram_index[adapter_name]
    chosen = torch.empty_like(index_OK)
    reader, multiple = base.rows(), base.row_multiple
    step = -(-rows_at_once(4 * layer.in_features) // multiple) * multiple
    for start in range(0, layer.out_features, step):
        rows = slice(start, min(layer.out_features, start + step))
        part_CI = torch.empty(rows.stop - rows.start, layer.in_features, device=index_OK.device)
        reader.read(rows, part_CI)
        chosen[rows] = top_columns(part_CI.abs_(), index_OK.shape[1])
    return chosen


def _random_columns(layer: MoRAMLinear, name: str, adapter_name: str, seed: int) -> torch.Tensor:
    """Return columns drawn without replacement, the same on every rank and device."""
    index_OK = layer.moram_index[adapter_name]
    source = generator(seed, "connections", name)
    step = rows_at_once(4 * layer.in_features)
    parts = []
    for start in range(0, layer.out_features, step):
        count = min(step, layer.out_features - start)
        parts.append(top_columns(torch.rand(count, layer.in_features, generator=source), index_OK.shape[1]))
    return torch.cat(parts).to(index_OK.device)

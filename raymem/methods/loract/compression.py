"""Installing compression in a model, and the handle that undoes it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from raymem.errors import ModelError
from raymem.methods.layers.gated_mlp import is_gated_mlp
from raymem.methods.layers.norms import NormForm, recognise
from raymem.methods.loract import sites
from raymem.methods.loract.auto_rank import Calibration
from raymem.methods.loract.config import LoRActOptions
from raymem.methods.loract.forwards import (
    GatedMLP,
    Layer,
    LayerOfLinears,
    LayerOfSubLayers,
    LinearInput,
    Norm,
    Patched,
    SubLayer,
)
from raymem.methods.loract.packer import Packer, Report, Site

log = logging.getLogger(__name__)

_ATTRIBUTE = "raymem_loract"


def compress_activations(
    model: nn.Module,
    options: LoRActOptions | None = None,
    *,
    layers: str | nn.ModuleList | None = None,
    seed: int = 0,
    **fields: Any,
) -> Compression:
    """Keep activations as low-rank factors for backward (LoRAct), from now on, in any training loop.

    Args:
        model: a transformer of transformers or plain PyTorch, also wrapped by PEFT; wrap it before this call.
        options: or its fields one by one, for example ``rank=0.125, scope="sublayer"``.
        layers: as ``options.layers``, or the layers themselves.
        seed: seeds the sketches.

    Returns:
        A handle; ``handle.remove()`` undoes it, and so does leaving it as a context manager.

    Raises:
        ValueError: an option out of range.
        ModelError: no layers or sites were found, the rank is above the hidden size, the model is compressed already,
            or it is on the CPU and ``side_stream`` was asked for.
    """
    if isinstance(layers, str):
        fields["layers"], layers = layers, None
    if options is not None and fields:
        raise ValueError(f"options: give them whole or field by field ({', '.join(fields)}), not both")
    options = LoRActOptions(**fields) if options is None else options
    handle = Compression(model, options, options.layers if layers is None else layers, seed)
    object.__setattr__(model, _ATTRIBUTE, handle)
    return handle


def compression_of(model: nn.Module) -> Compression:
    """Return the handle that :func:`compress_activations` gave for this model; the last one, if it was removed."""
    assert _ATTRIBUTE in model.__dict__, "compress_activations comes first"
    handle: Compression = model.__dict__[_ATTRIBUTE]
    return handle


class Compression:
    """Handle of a model whose activations are compressed; made by :func:`compress_activations`."""

    def __init__(self, model: nn.Module, options: LoRActOptions, layers: str | nn.ModuleList | None, seed: int) -> None:
        for name, module in model.named_modules():
            if isinstance(module.__dict__.get("forward"), Patched):
                raise ModelError(f"{name}: the activations of this model are compressed already; call remove() first")
        self._first = next(model.parameters(), None)
        if options.side_stream and self._device.type == "cpu":
            raise ModelError("side_stream: true needs a CUDA device, but the model is on the CPU; set it to false")
        self.options = options
        self._seed = seed
        self._hooks: list[RemovableHandle] = []
        self._packer = Packer(
            power_iterations=options.power_iterations,
            seed=seed,
            report_every=options.report_every,
            side_stream=options.side_stream,
        )
        self._patches: list[Patched] = []
        self._linear_inputs: list[tuple[nn.Module, LinearInput]] = []
        named_layers = sites.find_layers(model, layers)
        firsts = sites.first_of_each_stack(named_layers) if options.first_input == "raw" else set()
        for name, layer in named_layers.items():
            self._plan(name, layer, is_first=name in firsts)
        self._install()
        log.info("LoRAct: scope %s, %d sites in %d layers", options.scope, len(self._sites()), len(named_layers))

    def __enter__(self) -> Compression:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Undo the installation; a backward pass of an earlier forward pass still works."""
        for patch in self._patches:
            patch.remove()
        for hook in self._hooks:
            hook.remove()

    def begin_step(self, step: int) -> None:
        """Name the training step: sketches are then a function of (seed, step, site), whatever came before.

        Without it each site counts its tensors, which is as good but for resuming in the middle.
        """
        self._packer.step = step

    @property
    def report(self) -> Report:
        """Counts and bytes of the first pass; complete when its backward pass begins."""
        return self._packer.report

    @property
    def ranks(self) -> dict[str, int]:
        """Site -> rank. With ``rank: auto`` the highest allowed ones until a calibration."""
        return {site.name: site.rank for site in self._sites()}

    def errors(self) -> dict[str, float]:
        """Site -> relative error of the last tensor that ``report_every`` had measured; waits for the device."""
        return {name: float(error) for name, error in self._packer.errors.items()}

    @contextlib.contextmanager
    def calibration(self) -> Iterator[None]:
        """Choose the rank of every site from the forward passes inside; collective over the process group.

        They run without gradients, in training mode, and leave the global random stream as it was. ::

            with handle.calibration():
                model(**batch)
        """
        calibration = Calibration(self._sites(), self.options.power_iterations, self._seed)
        devices = [self._device.index or 0] if self._device.type == "cuda" else []
        self._packer.observer = calibration.observe
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                yield
        finally:
            self._packer.observer = None
        self.set_ranks(calibration.choose(self.options.tolerance, self._device))
        log.info("LoRAct: ranks by calibration: %s", self.ranks)

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Give every site its rank, for example those of an earlier calibration.

        Raises:
            ModelError: the sites are others than those of this model.
        """
        if set(ranks) != set(self.ranks):
            odd = sorted(set(ranks) ^ set(self.ranks))[0]
            raise ModelError(f"{odd}: the ranks belong to other sites than those of this model; calibrate again")
        for site in self._sites():
            site.rank = ranks[site.name]

    @property
    def _device(self) -> torch.device:
        """Where the model is by now: trainers may move it after it was compressed."""
        return torch.device("cpu") if self._first is None else self._first.device

    def _sites(self) -> list[Site]:
        every = [site for patch in self._patches for site in patch.sites]
        every += [hook.site for _, hook in self._linear_inputs]
        return list({site.name: site for site in every}.values())

    def _plan(self, name: str, layer: nn.Module, *, is_first: bool) -> None:
        size = sites.hidden_size(name, layer)
        site = Site(name, size, self._rank(size), exact=self.options.scope == "layer" and sites.routes_tokens(layer))
        match self.options.scope:
            case "layer":
                self._patches.append(Layer(layer, site, self._packer, is_first=is_first))
            case "sublayer":
                self._patches.append(LayerOfSubLayers(layer, site, self._packer, is_first=is_first))
                self._plan_sublayers(name, layer, site)
            case "linear":
                self._patches.append(LayerOfLinears(layer, site, self._packer, is_first=is_first))
                self._plan_linears(name, layer, site)

    def _plan_sublayers(self, name: str, layer: nn.Module, outer: Site) -> None:
        wrapped = 0
        for inner, child in sites.sublayers(name, layer):
            site = Site(inner, outer.hidden_size, outer.rank, exact=sites.routes_tokens(child))
            form = self._norm_form(child, outer.hidden_size)
            if form is not None:
                self._patches.append(Norm(child, site, self._packer, form=form))
            elif sites.has_matrices(child):
                self._patches.append(SubLayer(child, site, self._packer))
                wrapped += 1
        if not wrapped:
            raise ModelError(
                f"{name}: {type(layer).__name__} has no sub-layers to compress; use scope: layer, or choose whole "
                "transformer layers with layers="
            )

    def _plan_linears(self, name: str, layer: nn.Module, outer: Site) -> None:
        for inner, module in layer.named_modules(prefix=name):
            form = self._norm_form(module, outer.hidden_size)
            if form is not None:
                site = Site(inner, outer.hidden_size, outer.rank)
                self._patches.append(Norm(module, site, self._packer, form=form))
            elif is_gated_mlp(module):
                site = Site(inner, outer.hidden_size, outer.rank, of_inputs=True)
                self._patches.append(GatedMLP(module, site, self._packer))
        for inner, module in sites.linear_modules(name, layer):
            site = Site(inner, outer.hidden_size, outer.rank)
            self._linear_inputs.append((module, LinearInput(site, self._packer)))

    def _norm_form(self, module: nn.Module, size: int) -> NormForm | None:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor | None) or (weight is not None and weight.ndim != 1):
            return None
        return recognise(module, size)

    def _rank(self, size: int) -> int:
        key = "max_rank" if self.options.rank == "auto" else "rank"
        rank = self.options.max_rank if self.options.rank == "auto" else self.options.rank
        assert not isinstance(rank, str)
        if isinstance(rank, float):
            return max(1, round(rank * size))
        if rank > size:
            raise ModelError(
                f"{key}: {rank} is more than the hidden size {size} of the model; use at most that, or a fraction of it"
            )
        return rank

    def _install(self) -> None:
        for patch in self._patches:
            patch.install()
        for module, hook in self._linear_inputs:
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

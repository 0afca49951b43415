"""Compression of the tensors that sites hand over: each tensor once, however many operations save it."""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from raymem.linalg import LowRank, row_sampled_qb
from raymem.methods.layers.saved import Factors, Held, Raw, Saved, without_autocast
from raymem.methods.loract.eligibility import is_plain, reason_to_keep
from raymem.methods.loract.streams import compress_beside
from raymem.seeds import generator

log = logging.getLogger(__name__)

# T tokens (all leading dimensions), N features, R rank

Key = tuple[Any, ...]


@dataclass
class Site:
    """One place in the model whose tensors are compressed."""

    name: str
    """Name of the module, as ``named_modules`` gives it."""
    hidden_size: int
    """Hidden size of the layer that the module belongs to."""
    rank: int
    """Rank for tensors as wide as the hidden size."""
    of_inputs: bool = False
    """Whether the tensors are linear maps of a layer input, and so of no higher rank than that, however wide."""
    exact: bool = False
    """Whether backward needs exact values here (a mixture of experts routes by them)."""
    calls: int = 0
    """Tensors compressed here so far: what seeds the sketch where nobody names the step."""

    def rank_of(self, features: int, rank: int | None = None) -> int:
        """Rank for a tensor with this many features: wider ones get proportionally more.

        So full rank means exact everywhere (dropout in LoRA can lift even linear maps above the rank of their input).
        """
        rank = self.rank if rank is None else rank
        if features <= self.hidden_size or (self.of_inputs and rank < self.hidden_size):
            return min(rank, features)
        return math.ceil(rank * features / self.hidden_size)


@dataclass
class Report:
    """Tensors that the first pass held for backward at the sites, counted before any of them was used."""

    compressed: int = 0
    """Tensors that were compressed."""
    shared: int = 0
    """Further uses of a tensor that was held already."""
    raw: Counter[str] = field(default_factory=Counter)
    """Tensors that were kept, by reason (see :mod:`raymem.methods.loract.eligibility`)."""
    full_bytes: int = 0
    """Bytes of the distinct tensors themselves."""
    held_bytes: int = 0
    """Bytes that are held instead of them."""

    def __str__(self) -> str:
        exact = ", ".join(f"{count} {reason}" for reason, count in sorted(self.raw.items())) or "none"
        return (
            f"{self.compressed} tensors compressed and shared by {self.shared} further uses; kept raw: {exact}; "
            f"{self.held_bytes / 2**20:.1f} MiB held instead of {self.full_bytes / 2**20:.1f}"
        )


class Packer:
    """Turns tensors into what is held for backward.

    Args:
        power_iterations: for the range finder.
        seed: the run's.
        report_every: steps between measured errors, 0 for none.
        side_stream: compress CUDA tensors beside the forward pass.
    """

    def __init__(self, *, power_iterations: int, seed: int, report_every: int, side_stream: bool) -> None:
        self.step: int | None = None
        """Number of the training step, if somebody names it; else the calls of each site are counted."""
        self.report = Report()
        self.errors: dict[str, torch.Tensor] = {}
        """Site -> relative error of the last tensor that was measured, 0-dim."""
        self.observer: Callable[[torch.Tensor, Site], None] | None = None
        """Sees the tensors of a calibration pass instead of their being packed."""
        self.visits = 0
        """How often a site was reached: what shows that the sites of a layer are on its path."""
        self._power_iterations = power_iterations
        self._seed = seed
        self._report_every = report_every
        self._side_stream = side_stream
        self._reported = False
        self._known: dict[Key, tuple[StorageWeakRef, weakref.ref[Held]]] = {}
        self._first: dict[Key, StorageWeakRef] = {}
        self.linear_inputs: dict[Key, tuple[StorageWeakRef, Site]] = {}
        """Inputs of the linear layers of the layer that runs."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is known of live tensors: a copy of the model has other tensors."""
        return {**self.__dict__, "_known": {}, "_first": {}, "linear_inputs": {}, "observer": None}

    def pack(self, tensor: torch.Tensor, site: Site) -> Saved:
        """Hold a tensor for backward: compressed, unless the rule says raw or it is held already."""
        self.visits += 1
        if not is_plain(tensor):
            return self._keep(tensor, "kind")
        key = key_of(tensor)
        held = self._find(key)
        if held is not None:
            if site.exact and isinstance(held, Factors):
                before = held.num_bytes
                held.keep_exact(tensor)
                self._count(compressed=-1, raw="moe", held_bytes=held.num_bytes - before)
            self._count(shared=1)
            return Saved(held, tensor.shape)
        reason = "first" if key in self._first else "moe" if site.exact else None
        reason = reason or reason_to_keep(tensor, site.rank_of(tensor.shape[-1]), site.hidden_size)
        if reason is not None:
            return self._keep(tensor, reason)
        held = self._compress(tensor, site)
        self._count(compressed=1, full_bytes=_bytes(tensor), held_bytes=held.num_bytes)
        return self.remember(tensor, held)

    def keep(self, tensor: torch.Tensor) -> Saved:
        """Hold a tensor that no site handed over: as it is, or by what is known of it."""
        held = self._find(key_of(tensor)) if is_plain(tensor) else None
        return Saved(held or Raw(tensor), tensor.shape)

    def remember(self, tensor: torch.Tensor, held: Held) -> Saved:
        """Let ``held`` serve every later use of ``tensor`` as long as something refers to it."""
        key = key_of(tensor)
        known = self._known
        forget = weakref.ref(held, lambda _: known.pop(key, None))
        known[key] = (weak_storage(tensor), forget)
        return Saved(held, tensor.shape)

    def mark_first(self, tensor: torch.Tensor, *, anew: bool = False) -> None:
        """Keep this tensor raw: it is the input of a first layer (``anew``), or made from that row by row."""
        if anew:
            self._first.clear()
        if is_plain(tensor):
            self._first[key_of(tensor)] = weak_storage(tensor)

    def is_first(self, tensor: torch.Tensor) -> bool:
        return bool(self._first) and is_plain(tensor) and key_of(tensor) in self._first

    def mark_linear_input(self, tensor: torch.Tensor, site: Site) -> None:
        """Compress this tensor if autograd saves it in the layer that runs."""
        self.visits += 1
        if is_plain(tensor):
            self.linear_inputs.setdefault(key_of(tensor), (weak_storage(tensor), site))

    def pack_marked(self, tensor: torch.Tensor) -> Saved:
        """Compress what was marked; hold all else as it is, or as it is held already."""
        marked = self.linear_inputs.get(key_of(tensor)) if is_plain(tensor) else None
        return self.keep(tensor) if marked is None else self.pack(tensor, marked[1])

    def hooks(self, pack: Callable[[torch.Tensor], Saved]) -> saved_tensors_hooks:
        """Saved-tensor hooks with this packing; what they save is held by the graph alone."""
        return saved_tensors_hooks(pack, self.unpack)

    def unpack(self, saved: Saved) -> torch.Tensor:
        """Return the tensor, when backward asks for it."""
        if not self._reported:
            self._reported = True
            log.info("LoRAct: %s", self.report)
        return saved.unpack()

    def _find(self, key: Key) -> Held | None:
        entry = self._known.get(key)
        return None if entry is None else entry[1]()

    def _keep(self, tensor: torch.Tensor, reason: str) -> Saved:
        held = Raw(tensor)
        self._count(raw=reason, full_bytes=held.num_bytes, held_bytes=held.num_bytes)
        return self.remember(tensor, held) if is_plain(tensor) else Saved(held, tensor.shape)

    def _compress(self, tensor: torch.Tensor, site: Site) -> Factors:
        matrix_TN = tensor.detach().flatten(0, -2)
        position = site.calls if self.step is None else self.step
        site.calls += 1

        def work() -> LowRank:
            # Neither rank nor micro-batch seeds it: workers that see the same rows make the same factors.
            rank = site.rank_of(matrix_TN.shape[1])
            return factorise(matrix_TN, rank, self._power_iterations, self._seed, position, site.name)

        if self._side_stream and matrix_TN.is_cuda:
            return Factors(*compress_beside(matrix_TN, work))
        low_rank = work()
        if self._report_every and position % self._report_every == 0:
            self.errors[site.name] = relative_error(matrix_TN, low_rank)
        return Factors(low_rank)

    def _count(
        self, *, compressed: int = 0, shared: int = 0, raw: str | None = None, full_bytes: int = 0, held_bytes: int = 0
    ) -> None:
        if self._reported:
            return
        self.report.compressed += compressed
        self.report.shared += shared
        self.report.full_bytes += full_bytes
        self.report.held_bytes += held_bytes
        if raw is not None:
            self.report.raw[raw] += 1


def factorise(
    matrix_TN: torch.Tensor, rank: int, power_iterations: int, seed: int, position: int, name: str
) -> LowRank:
    """Return row-sampled QB factors with the sketch of one (seed, step, site); outside autograd and autocast."""
    source = generator(seed, "loract", position, name)
    with torch.no_grad(), without_autocast(matrix_TN):
        return row_sampled_qb(matrix_TN, min(rank, *matrix_TN.shape), source, power_iterations)


@torch.no_grad()
def squared_error(matrix_TN: torch.Tensor, low_rank: LowRank) -> torch.Tensor:
    """Return the squared Frobenius norm of what the factors miss; 0-dim, fp32."""
    with without_autocast(matrix_TN):
        return (matrix_TN - low_rank.reconstruct()).float().square().sum()


def relative_error(matrix_TN: torch.Tensor, low_rank: LowRank) -> torch.Tensor:
    """Return the Frobenius norm of what the factors miss, relative to the matrix; 0-dim, fp32."""
    energy = matrix_TN.float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (squared_error(matrix_TN, low_rank) / energy).sqrt()


def key_of(tensor: torch.Tensor) -> Key:
    """Tell one saved value from every other: storage, place in it, layout, dtype and version.

    Views that differ only in how the leading dimensions are split are the same value, because autograd saves the input
    of a linear layer as two-dimensional view. Writes through ``.data`` do not count versions and are not seen.
    """
    layout: Any
    if tensor.is_contiguous():
        layout = (tensor.numel(), tensor.shape[-1] if tensor.ndim else 1)
    else:
        layout = (tuple(tensor.shape), tensor.stride())
    storage = tensor.untyped_storage()
    return (storage._cdata, tensor.storage_offset(), layout, tensor.dtype, tensor._version)


def weak_storage(tensor: torch.Tensor) -> StorageWeakRef:
    """Keep a storage's identity (part of the key) from being used again, but not its memory."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

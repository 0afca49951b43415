"""Replacements of a module's ``forward`` while activations are compressed.

Only the instance is changed, hooks of the module (FSDP2's, accelerate's) stay outside, and every patch is an object
that can be copied and pickled with its module.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raymem.errors import ModelError
from raymem.methods.layers.gated_mlp import GateFunction
from raymem.methods.layers.norms import NormForm, NormFunction
from raymem.methods.layers.saved import GateProduct, Saved
from raymem.methods.loract.packer import Key, Packer, Site, key_of


class Patched:
    """Base of the patches: passes through in evaluation, without gradients and once removed.

    Args:
        module: whose ``forward`` this replaces.
        site: its place.
        packer: shared by all sites of a model.
    """

    def __init__(self, module: nn.Module, site: Site, packer: Packer) -> None:
        self.module = module
        self.site = site
        self.packer = packer
        self.inner = module.forward
        self._was_patched = "forward" in module.__dict__
        self._removed = False
        names = list(inspect.signature(self.inner).parameters)
        self._first_parameter = names[0] if names else ""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it compresses."""
        return (self.site,)

    def install(self) -> None:
        self.module.forward = self

    def remove(self) -> None:
        """Undo :meth:`install`. Under a patch of somebody else this one stays, but only passes through."""
        self._removed = True
        if self.module.__dict__.get("forward") is not self:
            return
        if self._was_patched:
            self.module.forward = self.inner
        else:
            del self.module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        idle = self._removed or not self.module.training
        if idle or not (torch.is_grad_enabled() or self.packer.observer):
            return self.inner(*args, **kwargs)
        if not args and self._first_parameter in kwargs:
            args = (kwargs.pop(self._first_parameter),)
        if not args or not isinstance(args[0], torch.Tensor):
            raise ModelError(
                f"{self.site.name}: {type(self.module).__name__} was called without a tensor as its first argument, so "
                "there is nothing to compress; choose other modules with layers="
            )
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward pass; the first argument is a tensor."""
        raise NotImplementedError

    def observed(self, tensor: torch.Tensor) -> bool:
        """Say whether a calibration pass is under way; it has then seen the tensor."""
        if self.packer.observer is None:
            return False
        self.packer.visits += 1
        self.packer.observer(tensor, self.site)
        return True

    def checkpointed(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Non-reentrant checkpoint that holds its first argument compressed; others as they are, or as they are held
        already. Keywords live in the closure, but for those that are the first argument once more."""
        self.packer.visits += 1
        first = args[0]
        again = [at for at, value in enumerate(args) if at and value is first]
        named = [name for name, value in kwargs.items() if value is first]
        others = [value for at, value in enumerate(args) if at and at not in again]
        call = functools.partial(_call, function, again, {**kwargs, **dict.fromkeys(named)}, named)
        with self.packer.hooks(functools.partial(self._pack, key_of(first))):
            return checkpoint(call, first, *others, use_reentrant=False)

    def _pack(self, chosen: Key, tensor: torch.Tensor) -> Saved:
        if key_of(tensor) == chosen:
            return self.packer.pack(tensor, self.site)
        return self.packer.keep(tensor)


def _call(
    function: Any, again: list[int], kwargs: dict[str, Any], named: list[str], first: torch.Tensor, *others: Any
) -> Any:
    """Call with one tensor in all its places: attention asks whether query, key and value are the same object."""
    args = [first, *others]
    for at in again:
        args.insert(at, first)
    return function(*args, **{**kwargs, **dict.fromkeys(named, first)})


class SubLayer(Patched):
    """Attention or MLP: recomputed from its compressed input."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.observed(args[0]):
            return self.inner(*args, **kwargs)
        return self.checkpointed(self.inner, args, kwargs)


class Layer(Patched):
    """A transformer layer; the switch of transformers' own checkpointing has no effect on it.

    Args:
        is_first: whether its input comes from the embeddings and is to be kept raw.
    """

    def __init__(self, module: nn.Module, site: Site, packer: Packer, *, is_first: bool) -> None:
        super().__init__(module, site, packer)
        self._is_first = is_first

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_first:
            self.packer.mark_first(args[0], anew=True)
        if self.packer.observer is not None:
            return self.compute_observed(args, kwargs)
        visits = self.packer.visits
        result = self.compute(args, kwargs)
        if self.packer.visits == visits:
            raise ModelError(
                f"{self.site.name}: none of the sites inside this {type(self.module).__name__} was on its path, so "
                "nothing was compressed; use scope: layer"
            )
        return result

    def compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.checkpointed(self.plain, *self._without_cache(args, kwargs))

    def compute_observed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.observed(args[0])
        return self.plain(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer itself, without transformers' checkpointing around it."""
        if not getattr(self.module, "gradient_checkpointing", False):
            return self.inner(*args, **kwargs)
        switched: Any = self.module
        switched.gradient_checkpointing = False
        try:
            return self.inner(*args, **kwargs)
        finally:
            switched.gradient_checkpointing = True

    def _without_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A key-value cache would be written a second time by the recomputation."""
        if getattr(self.module, "_can_checkpoint_with_cache", False):
            return args, kwargs
        from transformers.cache_utils import Cache

        # Known by its type: releases of transformers name the argument differently, or pass it by position.
        args = tuple(None if isinstance(value, Cache) else value for value in args)
        dropped = {name: None for name, value in kwargs.items() if isinstance(value, Cache)}
        return args, {**kwargs, **dropped, **({"use_cache": False} if kwargs.get("use_cache") else {})}


class LayerOfSubLayers(Layer):
    """A layer whose children are compressed, not itself."""

    @property
    def sites(self) -> tuple[Site, ...]:
        return ()

    def compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = self._without_cache(args, kwargs)
        return self.plain(*args, **kwargs)

    def compute_observed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.plain(*args, **kwargs)


class LayerOfLinears(LayerOfSubLayers):
    """A layer in which the inputs of linear layers are compressed wherever autograd keeps them."""

    def compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(self.module, "gradient_checkpointing", False):
            raise ModelError(
                f"{self.site.name}: scope: linear keeps what transformers' checkpointing would recompute; turn "
                "activation checkpointing off, or use scope: layer or sublayer"
            )
        self.packer.linear_inputs.clear()
        with self.packer.hooks(self.packer.pack_marked):
            return self.inner(*args, **kwargs)


class Norm(Patched):
    """RMSNorm or LayerNorm that keeps its compressed output."""

    def __init__(self, module: nn.Module, site: Site, packer: Packer, *, form: NormForm) -> None:
        super().__init__(module, site, packer)
        self._form = form

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if len(args) > 1 or kwargs:  # not the norm that was recognised
            return self.inner(*args, **kwargs)
        weight, bias = getattr(self.module, "weight", None), getattr(self.module, "bias", None)
        is_first = self.packer.is_first(x)
        differentiable = any(t is not None and t.requires_grad for t in (x, weight, bias))
        if self.packer.observer is not None or not differentiable:
            y = self.inner(x)
            if is_first:
                self.packer.mark_first(y)
            self.observed(y)
            return y
        save = functools.partial(self._save, is_first)
        return NormFunction.apply(x, weight, bias, self._form, self.inner, save)  # type: ignore[no-untyped-call]

    def _save(self, is_first: bool, y: torch.Tensor) -> Saved:
        if is_first:
            self.packer.mark_first(y)
        return self.packer.pack(y, self.site)


class GatedMLP(Patched):
    """SiLU-gated MLP that keeps gate and up projection compressed."""

    def __init__(self, module: nn.Module, site: Site, packer: Packer) -> None:
        super().__init__(module, site, packer)
        self._up = Site(f"{site.name}:up", site.hidden_size, site.rank, of_inputs=True)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.site, self._up

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.module
        gate, up = module.gate_proj(args[0]), module.up_proj(args[0])
        if self.packer.observer is not None:
            self.packer.observer(up, self._up)
        if self.observed(gate) or not (gate.requires_grad or up.requires_grad):
            return module.down_proj(module.act_fn(gate) * up)
        product = GateFunction.apply(gate, up, module.act_fn, self._save)  # type: ignore[no-untyped-call]
        return module.down_proj(product)

    def _save(self, gate: torch.Tensor, up: torch.Tensor, product: torch.Tensor) -> tuple[Saved, Saved, GateProduct]:
        saved_gate, saved_up = self.packer.pack(gate, self.site), self.packer.pack(up, self._up)
        factor_product = GateProduct(saved_gate.held, saved_up.held)
        self.packer.remember(product, factor_product)
        return saved_gate, saved_up, factor_product


class LinearInput:
    """Forward pre-hook of a linear layer: what comes in is compressed if autograd keeps it."""

    def __init__(self, site: Site, packer: Packer) -> None:
        self.site = site
        self.packer = packer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = (*args, *kwargs.values())
        if not module.training or not inputs or not isinstance(inputs[0], torch.Tensor):
            return
        if self.packer.observer is not None:
            self.packer.observer(inputs[0], self.site)
        elif torch.is_grad_enabled():
            self.packer.mark_linear_input(inputs[0], self.site)

"""The PEFT layer: a frozen linear layer, K int32 indices per output row, and two thin factors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from raymem.errors import AdapterError
from raymem.memory.target import device_kind, holds_no_values
from raymem.methods.moram.base import BaseWeight, base_weight, compute_dtype, fan, fingerprint, patch, restore
from raymem.methods.moram.config import connections
from raymem.methods.moram.ops import Chosen, choose_formulation, moram_linear, selected_delta
from raymem.private_apis import BufferDict

# T tokens, O outputs, I inputs, R rank, K connections per row

Tap = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Given (output, input) of a layer in the forward pass, returns the output; selection listens through it."""


class MoRAMLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with MoRAM adapters by name; made by :class:`raymem.methods.moram.MoRAMConfig` through PEFT.

    ``moram_A[name]`` is [R, I], ``moram_B[name]`` [O, R], ``moram_index[name]`` int32 [O, K] (-1: not selected yet) and
    ``moram_base[name]`` int64 [3], which identifies the base weight that the indices were selected for.
    """

    adapter_layer_names = ("moram_A", "moram_B")
    other_param_names = ("moram_index", "moram_base", "r", "scaling", "formulation")

    if TYPE_CHECKING:  # PEFT ships no types
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, where: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.where = where
        self.out_features, self.in_features = fan(self.get_base_layer())
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.formulation: dict[str, Chosen | None] = {}
        self.moram_A = nn.ParameterDict()
        self.moram_B = nn.ParameterDict()
        self.moram_index: Any = BufferDict(persistent=True)
        self.moram_base: Any = BufferDict(persistent=True)
        self.tap: Tap | None = None
        self._selected: set[str] = set()
        self._before_merge: dict[str, torch.Tensor] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def get_base_layer(self) -> Any:
        return BaseTunerLayer.get_base_layer(self)

    def update_layer(self, name: str, config: Any) -> None:
        """Add adapter ``name``, without a selection; A starts as in LoRA and B at zero.

        Raises:
            AdapterError: more connections are wanted than the layer has inputs.
        """
        if self.merged:
            raise AdapterError(f"{self.where}: an adapter is merged into the weight; call unmerge_adapter first")
        try:
            k = connections(config.k, config.density, self.in_features, self.where)
        except ValueError as error:
            raise AdapterError(str(error)) from None
        self.r[name], self.scaling[name] = config.r, config.alpha / config.r
        automatic: Chosen | None = "frugal" if config.save_memory else None
        self.formulation[name] = automatic if config.formulation == "auto" else config.formulation
        factor_A_RI, factor_B_OR = torch.empty(config.r, self.in_features), torch.zeros(self.out_features, config.r)
        nn.init.kaiming_uniform_(factor_A_RI, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.normal_(factor_B_OR, std=0.02)
        self.moram_A[name], self.moram_B[name] = nn.Parameter(factor_A_RI), nn.Parameter(factor_B_OR)
        self.moram_index[name] = torch.full((self.out_features, k), -1, dtype=torch.int32)
        self.moram_base[name] = torch.zeros(3, dtype=torch.int64)
        self._selected.discard(name)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base's device. PEFT before 0.21 gives all of it the base's dtype, positions too."""
        positions = [(held, held[adapter_name]) for held in (self.moram_index, self.moram_base) if adapter_name in held]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for held, integers in positions:
            held[adapter_name] = integers.to(held[adapter_name].device)

    def set_selection(self, name: str, index_OK: torch.Tensor, base: torch.Tensor) -> None:
        """Give adapter ``name`` its connections.

        Args:
            index_OK: ascending within each row.
            base: int64 [3], see :func:`raymem.methods.moram.base.fingerprint`.
        """
        self.moram_index[name].copy_(index_OK)
        self.moram_base[name].copy_(base)
        self._selected.add(name)

    def mark_selected(self, name: str) -> None:
        """Say that the index buffer was filled from outside (a checkpoint).

        Raises:
            AdapterError: it was not.
        """
        if bool((self.moram_index[name][:, 0] < 0).any()):
            raise AdapterError(f"{self.where}: the connections in the checkpoint were never selected; start over")
        self._selected.add(name)

    def check_base(self, recorded: torch.Tensor, name: str) -> bool:
        """Compare the base weight with the one that a selection was made for, int64 [3]. Collective if it is sharded.

        Returns:
            whether they could be compared: not if the base is stored in another format now.

        Raises:
            AdapterError: it is another one.
        """
        layer = self.get_base_layer()
        if layer.weight.is_meta or recorded.is_meta:
            return True
        now, then = fingerprint(layer).tolist(), recorded.tolist()
        if now[0] == then[0] and now != then:
            raise AdapterError(
                f"{name}: the base weight is not the one that the connections were selected for and trained on; load "
                "the base model (and revision) that the adapter names, or select and train again"
            )
        return bool(now[0] == then[0])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for key in state_dict:
            name = key.removeprefix(f"{prefix}moram_index.")
            if name != key and name in self.moram_index and bool((state_dict[key][:, 0] >= 0).all()):
                self._selected.add(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._selected.discard(adapter_name)

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Compute what the base layer does, with the update: [..., I] -> [..., O].

        Raises:
            AdapterError: an active adapter has no connections yet.
        """
        names = [name for name in self.active_adapters if name in self.moram_A]
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            names = []
        elif self.merged:
            names = []
        if self.tap is not None:
            names = [name for name in names if name in self._selected]
        result = self._adapted(x, names) if names else self.base_layer(x, *arguments, **options)
        return result if self.tap is None else self.tap(result, x)

    def _adapted(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        for name in names:
            self._require_selection(name)
        layer = self.get_base_layer()
        base = base_weight(layer)
        inputs = x.to(compute_dtype(layer, x))
        if base.weight is None:
            result: torch.Tensor = self.base_layer(x)
        else:
            result = self._apply_adapter(inputs, names[0], base, layer.bias)
            names = names[1:]
            if not torch.is_autocast_enabled(x.device.type):
                result = result.to(x.dtype)
        for name in names:
            result = result + self._apply_adapter(inputs, name, BaseWeight(None), None).to(result.dtype)
        return result

    def _apply_adapter(
        self, x: torch.Tensor, name: str, base: BaseWeight, bias_O: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        index_OK = self.moram_index[name]
        density = index_OK.shape[1] / self.in_features
        formulation = self.formulation[name] or choose_formulation(density, x.dtype, device_kind(x.device))
        return moram_linear(
            x, index_OK, self.moram_A[name], self.moram_B[name],
            scale=self.scaling[name], base=base, bias_O=bias_O, formulation=formulation,
        )  # fmt: skip

    def _require_selection(self, name: str) -> None:
        if name in self._selected or holds_no_values(self.moram_index[name]):
            return
        raise AdapterError(
            f"{self.where}: adapter {name!r} has no connections yet; call raymem.methods.moram.select_indices(model, "
            "batches) before training, or load a trained adapter"
        )

    def selected_delta(self, name: str) -> torch.Tensor:
        """Return the update at the selected places [O, K], in fp32 at least.

        Raises:
            AdapterError: the adapter has no connections yet.
        """
        self._require_selection(name)
        return selected_delta(self.moram_index[name], self.moram_A[name], self.moram_B[name], self.scaling[name])

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return the whole update [O, I] (for Conv1D [I, O]) as a dense matrix, in fp32 at least."""
        values_OK = self.selected_delta(adapter)
        dense_OI = torch.zeros(self.out_features, self.in_features, dtype=values_OK.dtype, device=values_OK.device)
        dense_OI.scatter_(1, self.moram_index[adapter].long(), values_OK)
        return dense_OI.mT if base_weight(self.get_base_layer()).transposed else dense_OI

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive, so PEFT's ``convert_to_lora`` may approximate it."""
        return True

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update into the base weight, rounded once to its dtype; a 4-bit weight is quantised anew.

        Args:
            safe_merge: refuse an update that is not finite before anything is written.

        Raises:
            AdapterError: the update is not finite, or the weight's format cannot be written.
        """
        for name in check_adapters_to_merge(self, adapter_names) or []:
            if name not in self.moram_A:
                continue
            values_OK = self.selected_delta(name)
            if safe_merge and not bool(torch.isfinite(values_OK).all()):
                raise AdapterError(f"{self.where}: the update of adapter {name!r} is not finite; it cannot be merged")
            layer = self.get_base_layer()
            base = base_weight(layer)
            if base.weight is None:
                raise AdapterError(
                    f"{self.where}: {type(layer).__name__} holds its weight in a form that MoRAM cannot write; "
                    "merge into an unquantised, unsharded base without hooks"
                )
            if base.quant_state is None:
                self._before_merge[name] = patch(layer, self.moram_index[name], values_OK)
            else:
                self._before_merge[name] = layer.weight
                layer.weight = _requantised(base, self.moram_index[name], values_OK)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was, bit for bit."""
        if not self.merged:
            warnings.warn("nothing is merged; there is nothing to undo", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            before, layer = self._before_merge.pop(name), self.get_base_layer()
            if base_weight(layer).quant_state is None:
                restore(layer, self.moram_index[name], before)
            else:
                layer.weight = before

    def __repr__(self) -> str:
        return "moram." + super().__repr__()


def layers(model: nn.Module, adapter_name: str | None = None) -> list[tuple[str, MoRAMLinear]]:
    """Name and layer of everything that MoRAM adapts (with this adapter), in the order of the model."""
    named_layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoRAMLinear)]
    return [(name, layer) for name, layer in named_layers if adapter_name is None or adapter_name in layer.moram_A]


def check_bases(recorded: dict[str, torch.Tensor], adapted: list[tuple[str, MoRAMLinear]]) -> None:
    """Do :meth:`MoRAMLinear.check_base` for all layers; warn once of those that cannot be compared.

    Args:
        recorded: layer name -> int64 [3].
    """
    unknown = [name for name, layer in adapted if not layer.check_base(recorded[name], name)]
    if unknown:
        warnings.warn(
            f"the base of {len(unknown)} layers (the first is {unknown[0]}) is stored in another format than when the "
            "connections were selected, so it is not verified that it is the same",
            stacklevel=3,
        )


def _requantised(base: BaseWeight, index_OK: torch.Tensor, values_OK: torch.Tensor) -> nn.Parameter:
    """Return a 4-bit weight with the update in it; the update is exact, quantising rounds it."""
    import bitsandbytes as bnb

    old: Any = base.weight
    whole_OI = torch.empty(index_OK.shape[0], base.quant_state.shape[1], device=index_OK.device)
    base.rows().read(slice(0, len(whole_OI)), whole_OI)
    whole_OI.scatter_add_(1, index_OK.long(), values_OK.float())
    packed = bnb.nn.Params4bit(
        whole_OI.to(base.quant_state.dtype),
        requires_grad=False,
        quant_type=old.quant_type,
        compress_statistics=old.compress_statistics,
        blocksize=old.blocksize,
        module=old.module,
    )
    return packed.to(index_OK.device)  # type: ignore[no-any-return]


import_module("raymem.methods.moram.tuner")  # registers it with PEFT, whichever module is imported first

"""MoRAM as a method of PEFT: the config, the tuner, what goes into a file, and the registration.

PEFT keeps its methods in a closed enum. Registering from outside needs a member added at run time. A process that loads
a MoRAM adapter must have imported raymem.methods.moram; unpickling a :class:`MoRAMConfig` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from torch import nn

from raymem.errors import AdapterError
from raymem.methods.moram.config import Formulation, check_sizes
from raymem.methods.moram.indices import pack_indices, packed_bytes_per_row, unpack_indices, valid
from raymem.methods.moram.layer import MoRAMLinear, check_bases, layers
from raymem.versions import WINDOWS


def _extend_peft(name: str) -> Any:
    """Add a new member to PEFT's enum of methods, and see that PEFT finds it.

    Raises:
        ImportError: a release of PEFT in which that does not work.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    if not _is_known(member):
        raise ImportError(
            f"raymem.methods.moram cannot add a method to PEFT's list in peft {version('peft')}; raymem is tested with "
            f"peft {WINDOWS['peft']}"
        )
    return member


def _is_known(member: Any) -> bool:
    try:
        return PeftType(member.value) is member and PeftType[member.name] is member and member in list(PeftType)
    except (KeyError, ValueError):
        return False


if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
    raise ImportError(
        "MoRAM writes and reads its index sets through hooks that peft has since 0.21, and this is peft "
        f"{version('peft')}; pip install 'peft>=0.21', or take another adapter"
    )
MORAM = _extend_peft("MORAM")


@dataclass
class MoRAMConfig(PeftConfig):  # type: ignore[misc]
    """PEFT config of MoRAM.

    Args:
        r: rank of the factors.
        k: input connections per output row; instead of ``density``.
        density: share of its inputs that every output row keeps, in (0, 1]; 0.03 if neither is given.
        alpha: the update is scaled by alpha / r.
        target_modules: ``"all-linear"``, names (whole, or the end after a dot), or one regular expression.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in every PEFT method.
        formulation: ``fast``, ``frugal`` or ``auto``: by density, dtype and device.
        save_memory: let ``auto`` take ``frugal`` whatever the speed.
        init_weights: False starts B at random instead of zero; for tests.

    Raises:
        ValueError: an option is out of range.
    """

    r: int = 16
    k: int | None = None
    density: float | None = None
    alpha: float = 32.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    formulation: Formulation = "auto"
    save_memory: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MORAM
        check_sizes(self.r, self.k, self.density, self.alpha, rank_name="r")
        if self.formulation not in ("auto", "fast", "frugal"):
            raise ValueError(f"formulation: {self.formulation!r} is not one of auto, fast, frugal")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))


class MoRAMModel(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner: wraps the targeted layers, and writes and reads the index sets in their packed form."""

    prefix = "moram_"
    tuner_layer_cls = MoRAMLinear
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _create_and_replace(
        self, config: MoRAMConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **options: Any,
    ) -> None:  # fmt: skip
        if isinstance(target, MoRAMLinear):
            target.update_layer(adapter_name, config)
            return
        try:
            wrapped = MoRAMLinear(target, adapter_name, config, current_key)
        except AdapterError as error:
            text = str(error)
            raise AdapterError(text if current_key in text else f"{current_key}: {text}") from None
        if adapter_name not in self.active_adapters:
            wrapped.requires_grad_(False)  # an additional adapter is not trained until it is activated
        self._replace_module(parent, target_name, wrapped, target)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, adapter_name: str, **options: Any) -> dict[str, torch.Tensor]:
        """Return PEFT's choice of tensors, with packed indices.

        Raises:
            AdapterError: a layer has no connections yet.
        """
        state: dict[str, torch.Tensor] = super()._get_adapter_state_dict(
            model=model, adapter_name=adapter_name, **options
        )
        for name, layer in layers(model):
            key = f"{name}.moram_index.{adapter_name}"
            if key not in state:
                continue
            if not valid(state[key], layer.in_features):
                raise AdapterError(
                    f"{name}: adapter {adapter_name!r} has no connections yet, so there is nothing to save; call "
                    "select_indices first"
                )
            state[key] = pack_indices(state[key], layer.in_features)
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of a file under the names of the model, indices unpacked.

        Raises:
            AdapterError: the file is for layers of another shape, is incomplete or damaged, or was trained on other
                base weights.
        """
        state: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        adapted = layers(model, adapter_name)
        for name, layer in adapted:
            k = layer.moram_index[adapter_name].shape[1]
            expected = {
                "moram_A": layer.moram_A[adapter_name].shape,
                "moram_B": layer.moram_B[adapter_name].shape,
                "moram_index": (layer.out_features, packed_bytes_per_row(k, layer.in_features)),
                "moram_base": layer.moram_base[adapter_name].shape,
            }
            for part, shape in expected.items():
                tensor = state.get(f"{name}.{part}.{adapter_name}")
                if tensor is None:
                    raise AdapterError(f"{name}: {part} is missing from the adapter's file; it is for other targets")
                if tuple(tensor.shape) != tuple(shape):
                    raise AdapterError(
                        f"{name}: {part} is {list(tensor.shape)} in the adapter's file but {list(shape)} in this "
                        "model; it was trained on a base of another shape, or with another r, k or density"
                    )
        check_bases({name: state[f"{name}.moram_base.{adapter_name}"] for name, _ in adapted}, adapted)
        for name, layer in adapted:
            key = f"{name}.moram_index.{adapter_name}"
            try:
                k = layer.moram_index[adapter_name].shape[1]
                state[key] = unpack_indices(state[key], k, layer.in_features)
            except ValueError as error:
                raise AdapterError(f"{name}: {error}; fetch the adapter again") from None
        return state


def model_state(
    model: Any, tensors: dict[str, torch.Tensor], adapter_name: str = "default"
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return tensors of an adapter's file under the names of a model that has the adapter attached. Collective if
    sharded.

    Raises:
        AdapterError: the file does not belong to this model; see :meth:`MoRAMModel._remap_adapter_state_dict_for_load`.
    """
    return MoRAMModel._remap_adapter_state_dict_for_load(model, None, adapter_name, tensors)


register_peft_method(name="moram", config_cls=MoRAMConfig, model_cls=MoRAMModel)

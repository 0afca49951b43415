"""Puts layers that hold their weights in 4 bits into a model on the meta device; their values come with the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from raymem.errors import ModelError
from raymem.memory import nf4
from raymem.memory.packed import PackedLinear
from raymem.training.model import experts, weights


def place(base_model: Any, dtype: torch.dtype, *, planned: bool, sharded: bool) -> None:
    """Swap every linear layer but the output head for a 4-bit one (NF4, double quantisation, as QLoRA), and experts.

    Args:
        base_model: bare transformers model on the meta device.
        dtype: in which the layers multiply.
        planned: only memory counts; no bitsandbytes is needed.
        sharded: FSDP2 is going to shard the model.

    Raises:
        ModelError: bitsandbytes is not installed, or there are experts of an unknown layout.
    """
    if not planned:
        _require_bitsandbytes()
    experts.place(base_model, dtype, planned=planned)
    if sharded:
        _swap(base_model, partial(PackedLinear, dtype=dtype, planned=planned))
    else:
        _swap(base_model, partial(nf4.Linear4bit if planned else _linear_of_bitsandbytes, dtype=dtype))


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError("base.quantize: nf4 needs bitsandbytes: pip install 'raymem[quant]'") from None


def _swap(base_model: Any, make: Callable[[int, int, bool], nn.Module]) -> None:
    """Replace the linear layers that transformers would quantise.

    Args:
        make: builds the layer of so many inputs and outputs, with or without a bias.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    unquantised = get_keys_to_not_convert(base_model)
    for name, module in list(base_model.named_modules()):
        if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, unquantised):
            transposed = isinstance(module, Conv1D)
            inputs, outputs = module.weight.shape if transposed else module.weight.shape[::-1]
            layer: Any = make(inputs, outputs, module.bias is not None)
            setattr(layer, weights.TRANSPOSED, transposed)
            base_model.set_submodule(name, layer)


def _linear_of_bitsandbytes(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    layer: Any = bnb.nn.Linear4bit(
        inputs, outputs, bias, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    # On CPUs with AVX512-BF16 the first evaluation would repack the weights for a kernel that has no gradient.
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False
    return layer.requires_grad_(False)  # type: ignore[no-any-return]

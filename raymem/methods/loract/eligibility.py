"""Decides by one rule which tensors are compressed.

Only what a site (a layer input, a norm's output, a linear layer's input, a gate) hands over is ever a candidate; that
keeps parameters, masks, attention internals, logits and the loss out by construction. Of the candidates these stay raw:

=============  ========================================================================================
reason         why
=============  ========================================================================================
first          input of the first layer of a stack, or a norm of it (option ``first_input``)
moe            input of a mixture of experts that is recomputed: an approximation would route other tokens
kind           integers, masks, sparse or distributed tensors
narrow         fewer features than half the hidden size, such as what lies between the two factors of LoRA
short          no more rows than the rank: factors would hold the same and be larger
=============  ========================================================================================
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def is_plain(tensor: torch.Tensor) -> bool:
    """Say whether this is a dense tensor of this process with floating-point values."""
    dense = tensor.layout is torch.strided and not isinstance(tensor, DTensor)
    return dense and tensor.is_floating_point()


def reason_to_keep(tensor: torch.Tensor, rank: int, hidden_size: int) -> str | None:
    """Say why a candidate stays raw; None if it is to be compressed."""
    if not is_plain(tensor) or tensor.ndim < 2:
        return "kind"
    features = tensor.shape[-1]
    if 2 * features < hidden_size:
        return "narrow"
    if tensor.numel() // max(1, features) <= rank:
        return "short"
    return None

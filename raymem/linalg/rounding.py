"""Rounding to half precision that keeps what it cuts off, on average."""

from __future__ import annotations

import torch


def stochastic_round(value: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Round fp32 to bf16 without bias: up with a probability equal to the cut-off fraction.

    Adding a random 16-bit number below the bits that bf16 keeps carries into them exactly that often.
    """
    noise = torch.randint(0, 1 << 16, value.shape, generator=source, device=value.device, dtype=torch.int32)
    bits = (value.contiguous().view(torch.int32) + noise) & -(1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)

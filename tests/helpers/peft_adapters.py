"""Adapters that plain PEFT writes, with random values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers.support import save_tokenizer


def save_peft(folder: Path, base: Path, config: Any) -> Path:
    """Write an adapter of PEFT with random values, and a tokenizer; returns its directory."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder

"""Adapters in PEFT's files, read by PEFT itself: every kind and option that it knows, whoever wrote them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from raymem.errors import ModelError
from raymem.methods.peft.importing import without_bitsandbytes
from raymem.methods.sentences import as_sentence


def load_adapter(base: Any, directory: Path, device: torch.device | str) -> Any:
    """Put the adapter of a PEFT directory on a loaded model, in its stored dtype.

    Raises:
        ModelError: PEFT cannot, or finds no values for a part of it.
    """
    with without_bitsandbytes():
        from peft import PeftModel

        with (
            as_sentence(
                ModelError,
                f"{directory}: PEFT cannot put this adapter on {type(base).__name__}",
                "give the base that it was trained on, or another adapter",
            ),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(
                base, str(directory), low_cpu_mem_usage=True, autocast_adapter_dtype=False, torch_device=str(device)
            )

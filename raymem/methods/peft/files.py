"""Adapters in PEFT's files, read by PEFT itself: every kind and option that it knows, whoever wrote them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from raymem.account import refuse_not_finite
from raymem.errors import ModelError
from raymem.methods.peft.importing import without_bitsandbytes
from raymem.methods.sentences import as_sentence
from raymem.storage.json_files import read_object

_CURE = "train the adapter again (with a lower learning rate if that made them), or take another copy"


def load_adapter(base: Any, directory: Path, device: torch.device | str, *, in_base_dtype: bool = True) -> Any:
    """Put the adapter of a PEFT directory on a loaded model.

    On a model without values (on the meta device) it has none either: :func:`adapter_values` has them.

    Args:
        in_base_dtype: the adapter has the dtype of the base, as in training; otherwise it is fp32 beside a base of
            lower precision, as PEFT itself has it.

    Raises:
        ModelError: PEFT cannot, or finds no values for a part of it; its weights are pickled, or not finite.
    """
    # Every kind of PEFT that has a rank calls it r, and compares it as a number without looking.
    read_object(
        directory / "adapter_config.json", ModelError, "give the directory of an adapter", {"r": (int, type(None))}
    )
    _check_weights(directory)
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
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            return PeftModel.from_pretrained(
                base,
                str(directory),
                low_cpu_mem_usage=in_base_dtype,  # rounds to the base's dtype before anything else
                autocast_adapter_dtype=not in_base_dtype,
                torch_device=str(device),
            )


def adapter_values(model: Any, directory: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a PEFT directory, whole and on the CPU, under the names of a model with that adapter.

    PEFT itself says which tensor belongs where, and would then copy it there. A model whose tensors are on the meta
    device, or about to be sharded, has no place for whole ones yet.
    """
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    values: dict[str, torch.Tensor] = {}
    result = torch.nn.modules.module._IncompatibleKeys([], [])

    def keep(state: dict[str, torch.Tensor], **options: Any) -> Any:
        values.update(state)
        return result

    model.__dict__["load_state_dict"] = keep
    try:
        set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"))
    finally:
        del model.__dict__["load_state_dict"]
    return values


def _check_weights(directory: Path) -> None:
    """Refuse pickled weights, which PEFT would read, and weights with which everything that is computed is nan."""
    from safetensors import SafetensorError, safe_open

    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(
            f"{directory} holds no {path.name}; raymem reads no pickled weights (adapter_model.bin): load the adapter "
            "with PEFT and save it again (save_pretrained)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                finite(file.get_tensor(key), key, path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error}); take a whole copy") from None


def finite(tensor: torch.Tensor, key: str, path: Path) -> torch.Tensor:
    """Return a tensor of an adapter's file. Raises ModelError if a number in it is nan or infinite."""
    return refuse_not_finite(tensor, f"{path}: tensor {key}", _CURE)

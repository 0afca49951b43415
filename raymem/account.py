"""The account of a checkpoint: every tensor of it is loaded, known to be of no use, or the model is refused.

transformers leaves out what a model has no place for and says so in a long warning; weights that are stored in fewer
bits beside their scales would then be read as plain numbers. Here nothing is left out without a reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raymem.errors import ModelError

FLOATS = frozenset(["F64", "F32", "F16", "BF16"])
"""Dtypes, as safetensors spells them, whose numbers are the weights themselves."""

NO_USE: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(inv_freq|cos_cached|sin_cached)$", "a table of angles, which is computed from the config"),
    (r"(^|\.)position_ids$", "the numbers 0, 1, 2, ..."),
    (r"(^|\.)num_batches_tracked$", "a counter"),
    (r"^(v_head|value_head|score|classifier|qa_outputs)\.", "a head of another task, behind the language model"),
)
"""Names of tensors that no causal language model needs, each with the reason."""

_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$")
_PACKED = re.compile(
    r"(^|[._])(qweight|qzeros|scales|scales_and_zeros|g_idx|absmax|quant_map|SCB|weight_format|weight_scale\w*|"
    r"weight_zero_point|weight_packed|W_q|weight_shape|input_scale|output_scale|scale_inv|k_scale|v_scale|blocks)$"
    r"|\.(nested_absmax|nested_quant_map|quant_state\.\w+)$"
)
_PLAIN = FLOATS | {"I64", "BOOL"}
_CURE = (
    "raymem reads no quantised checkpoint: give the unquantised one of this model as model.name "
    "(base.quantize: nf4 quantises it while loading)"
)


@dataclass(frozen=True)
class Header:
    """The header that a safetensors file has for a tensor."""

    dtype: str
    """For example ``BF16``."""
    shape: tuple[int, ...]


def refuse_quantised(config: Any, name: object) -> None:
    """Refuse a model whose config says that its weights are stored in fewer bits.

    Args:
        config: of transformers; those of its parts (text, vision) count too.
        name: of the model, for the message.

    Raises:
        ModelError: it is quantised.
    """
    for key in ("quantization_config", "compression_config"):
        quantisation = getattr(config, key, None)
        if not quantisation:
            continue
        options: Mapping[str, Any] = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        method = options.get("quant_method")
        if method is None:
            method = "bitsandbytes" if any(name.startswith("load_in_") for name in options) else "an unnamed method"
        method = getattr(method, "value", method)
        raise ModelError(f"model.name: {name} is quantised: its config has {key} with quant_method {method}; {_CURE}")
    for part in vars(config).values():
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):
            refuse_quantised(part, name)


def refuse_not_finite(tensor: torch.Tensor, what: str, cure: str) -> torch.Tensor:
    """Return a tensor of numbers that can be computed with; with others everything that comes out is nan.

    Raises:
        ModelError: a number in it is nan or infinite.
    """
    if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
        smallest, largest = torch.aminmax(tensor.detach())  # both are nan if one number is; nothing is allocated
        if not bool(smallest.isfinite() & largest.isfinite()):
            raise ModelError(f"{what} holds numbers that are nan or infinite; {cure}")
    return tensor


def of_no_use(model: Any, key: str, header: Header) -> str | None:
    """Say why a tensor that ``model`` has no place for is of no use; None if that is not known.

    Args:
        key: its name in the model, as transformers renames it.
    """
    for pattern, reason in NO_USE:
        if re.search(pattern, key):
            return reason
    shape = header.shape
    if _MASK.search(key) and (len(shape) < 2 or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])):
        if len(shape) < 2 and not key.endswith("masked_bias"):
            return None  # a bias of numbers that count
        return "a causal mask, which is made anew"
    for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ():
        if re.search(pattern, key):
            return f"transformers leaves it out of {type(model).__name__}"
    return None


def unused(model: Any, where: object, stored: Mapping[str, tuple[str, Header]]) -> dict[str, str]:
    """Return the tensors of a checkpoint that are of no use, each with the reason; every other one has its place.

    Args:
        model: bare transformers model, on any device.
        where: directory or id of the checkpoint, for messages.
        stored: key in the files -> name in the model and what the file says of it.

    Returns:
        Key in the files -> reason.

    Raises:
        ModelError: a tensor is neither, or is stored in a form that is not its value.
    """
    is_float = {name: tensor.is_floating_point() for name, tensor in model.state_dict().items()}
    reasons: dict[str, str] = {}
    odd: dict[str, Header] = {}
    packed: dict[str, Header] = {}
    for key, (name, header) in stored.items():
        if name in is_float:
            if is_float[name] and header.dtype not in FLOATS:
                packed[key] = header
        elif (reason := of_no_use(model, name, header)) is not None:
            reasons[key] = reason
        else:
            (packed if header.dtype not in _PLAIN or _PACKED.search(key) else odd)[key] = header
    if packed or odd:
        raise ModelError(_refusal(model, where, packed, odd))
    return reasons


def refuse_two_places(where: object, entries: Iterable[tuple[str, str, str]]) -> None:
    """Refuse a checkpoint that holds a tensor twice: which of the two is the model would hang on the order of reading.

    Args:
        entries: name in the model, key and file of every tensor.

    Raises:
        ModelError: two of them have one name.
    """
    seen: dict[str, tuple[str, str]] = {}
    for name, key, file in entries:
        if name in seen:
            first, its_file = seen[name]
            raise ModelError(
                f"model.name: {where} holds tensor {name} twice, as {first} in {its_file} and as {key} in {file}; "
                "remove the files that belong to another set, or fetch the model again"
            )
        seen[name] = (key, file)


@torch.no_grad()
def refuse_untied(
    model: Any,
    where: object,
    names: Iterable[str],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse a checkpoint with two values for tensors that its config ties: which was meant is not known.

    transformers leaves them apart then; plans, pruning and sharding, which see the config alone, would not.

    Args:
        model: bare transformers model.
        names: of the tensors that the checkpoint holds, as in the model.
        read: a whole tensor by name.
        dtype: in which they are compared, as transformers does, which ties what is equal once it is loaded.

    Raises:
        ModelError: they differ.
    """
    present = set(names)
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, origin in ties.items():
        if target not in present or origin not in present:
            continue
        one, other = (read(name) if dtype is None else read(name).to(dtype) for name in (target, origin))
        if not torch.equal(one, other):
            raise ModelError(
                f"model.name: {where} holds {target} and {origin} with different values, but its config.json says that "
                "they are one (tie_word_embeddings); set tie_word_embeddings: false in its config.json if the model "
                "has an output head of its own"
            )


def _refusal(model: Any, where: object, packed: Mapping[str, Header], odd: Mapping[str, Header]) -> str:
    # Of a quantised checkpoint it is the form that tells most: a dtype before a name, whichever comes first.
    refused = sorted((packed or odd).items(), key=lambda item: item[1].dtype in FLOATS)
    key, header = refused[0]
    more = f" (one of {len(packed) + len(odd)} such)" if len(packed) + len(odd) > 1 else ""
    if packed:
        return (
            f"model.name: {where} holds weights in fewer bits than their value has: tensor {key} of dtype "
            f"{header.dtype}{more}; {_CURE}"
        )
    return (
        f"model.name: {where} holds tensor {key} of dtype {header.dtype} and shape {list(header.shape)}{more}, for "
        f"which {type(model).__name__}, as config.json describes it, has no place, and without it the model would "
        "compute something else; give the config.json that belongs to these weights, or save the model again with "
        "transformers if the tensor is of no use"
    )

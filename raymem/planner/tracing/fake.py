"""Puts fake tensors into a model, and arranges that the real step runs on them as on a device.

Three libraries take another path when they meet fake tensors, or decide by values that are not there. Each of the
shims here undoes one such difference; tests/planner/test_fake.py and test_process.py show what each is needed for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from raymem.errors import PlanError
from raymem.linalg.local import local
from raymem.memory import nf4
from raymem.memory.host import host_like, keep_on_host, lives_on_host
from raymem.memory.trace import Tracer
from raymem.private_apis import meta_registrations, sharding_propagation


@contextlib.contextmanager
def shims(*, one_segment_per_row: bool) -> Iterator[None]:
    """Patch other libraries while a step is traced.

    Args:
        one_segment_per_row: no row of a batch holds several examples. transformers sees that in the position ids, but
            of fake ones it must assume the opposite, and then makes masks [B, 1, S, S] that a real run has not.

    Raises:
        PlanError: another release of a library, without what is patched.
    """
    from transformers import masking_utils

    patches: list[tuple[Any, str, Any]] = [
        # Otherwise the shape arithmetic of distributed tensors takes place in our mode, with tensors of global shape.
        (sharding_propagation, "detect_fake_mode", lambda *args, **kwargs: None),
        # The products of experts exist in every dtype, but torch knows their shape in bfloat16 alone.
        (meta_registrations, "_meta_grouped_mm_common", _grouped_mm),
    ]
    if one_segment_per_row:
        patches.append((masking_utils, "find_packed_sequence_indices", lambda *args, **kwargs: None))
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(_replaced(owner, name, replacement))
        yield


def _grouped_mm(
    mat_a: torch.Tensor, mat_b: torch.Tensor, *, offs: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """Return an empty result of ``torch._grouped_mm``, whose groups lie along the rows of ``mat_a`` or along the sum.

    Args:
        mat_a: [tokens, k] or [groups, tokens, k].
        mat_b: [groups, k, n] or [k, n]; with ``mat_a`` of two dimensions the latter is cut along ``k``.
        offs: where each group ends, [groups].
    """
    rows, columns = mat_a.shape[-2], mat_b.shape[-1]
    if mat_a.dim() != mat_b.dim():
        return mat_a.new_empty(rows, columns)
    groups = mat_a.shape[0] if offs is None else offs.shape[0]
    return mat_a.new_empty(groups, rows, columns)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    if not hasattr(owner, name):
        raise PlanError(f"{owner.__name__} of this release has no {name}; install the versions in constraints.txt")
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


def fakeify(model: nn.Module, tracer: Tracer | None = None) -> None:
    """Replace meta tensors by fake CPU tensors of the same geometry; call inside fake mode.

    Tied parameters stay tied, distributed ones get a fake local part, 4-bit placeholders become packed bytes
    with their scales. The tracer, if any, is told what is weights and what is trained.
    """
    fresh: dict[int, nn.Parameter] = {}
    replaced = list(model.parameters())  # alive, or another one might get its id
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fresh:
                fresh[id(parameter)] = _fake_parameter(parameter)
            fake = module._parameters[name] = fresh[id(parameter)]
            if tracer is not None:
                full = f"{prefix}.{name}" if prefix else name
                tracer.adopt(local(fake), "trainable" if fake.requires_grad else "weights", full)
                for tensor in quantisation_tensors(fake):
                    tracer.adopt(tensor, "weights", f"{full} (scales)")
        for name, buffer in module._buffers.items():
            if buffer is not None:
                made_buffer = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype)
                module._buffers[name] = made_buffer
                if tracer is not None:
                    tracer.adopt(made_buffer, "weights", f"{prefix}.{name}")
    del replaced


def fake_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Count this worker's bytes behind fake tensors, which have no addresses; a shared storage counts once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = local(tensor).untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


@contextlib.contextmanager
def gradients_named(parameters: Mapping[str, nn.Parameter], tracer: Tracer) -> Iterator[None]:
    """Let the tracer tell gradients from temporaries inside the block, as soon as they exist."""
    handles = []
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            continue  # FSDP2 puts them there itself, after reducing; they are adopted with the norm

        def adopt_gradient(tensor: torch.Tensor, name: str = name) -> None:
            tracer.adopt(tensor.grad, "gradients", f"{name} (gradient)")

        hooks = parameter._post_accumulate_grad_hooks or {}
        handles.append(parameter.register_post_accumulate_grad_hook(adopt_gradient))  # type: ignore[no-untyped-call]
        parameter._post_accumulate_grad_hooks.move_to_end(handles[-1].id, last=not hooks)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fake_parameter(parameter: nn.Parameter) -> nn.Parameter:
    if isinstance(parameter, DTensor):
        local = parameter._local_tensor
        fake = DTensor.from_local(
            torch.empty_strided(local.shape, local.stride(), dtype=local.dtype),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return nn.Parameter(fake, requires_grad=parameter.requires_grad)
    if type(parameter).__name__ == "Params4bit":
        return nf4.quantised(parameter)
    if lives_on_host(parameter):
        return keep_on_host(nn.Parameter(host_like(parameter, torch.device("cpu"))))
    fake_parameter = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype)
    return nn.Parameter(fake_parameter, requires_grad=parameter.requires_grad)


def quantisation_tensors(parameter: Any) -> Iterator[torch.Tensor]:
    """Yield the scales and tables that belong to a quantised weight."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
        state = state.state2


# fmt: off
FP32_IN_CUDA_AUTOCAST = frozenset({
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "softplus", "layer_norm", "group_norm", "norm", "nuclear_norm", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "hinge_embedding_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss",
    "triplet_margin_loss", "multi_margin_loss", "cdist", "dist", "renorm", "logsumexp", "softmax", "log_softmax",
    "cumprod", "cumsum", "prod", "sum", "cross_entropy",
})
# fmt: on
"""Operations that CUDA's autocast runs in fp32 (PyTorch's documented list); that of CPUs lacks most of them."""


class CudaAutocast(TorchFunctionMode):
    """Makes autocast of CPU tensors cast where that of CUDA does."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in FP32_IN_CUDA_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args = tuple(_to_fp32(value) for value in args)
        return func(*args, **kwargs)


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value

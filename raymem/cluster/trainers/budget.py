"""Says, before a worker starts, whether what a trainer gives its workers is enough for a plan."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import ray
import ray.train
import torch

from raymem.errors import BudgetError, BudgetExceeded
from raymem.memory.budget import Fits, bytes_text
from raymem.memory.devices import GPUS, gpu_key
from raymem.planner.types import Plan

_CURE = "plan a smaller step (rows, sequence length, a rank, raymem's methods), or give the workers more"


def budget_check(scaling_config: ray.train.ScalingConfig, plan: Plan) -> Fits:
    """Compare the plan of a worker with what a ``ScalingConfig`` gives it; call it before ``fit()``.

    On GPUs that is the memory of the device: of ``accelerator_type``, of the smallest GPU in the cluster if Ray is
    connected, of the GPU that was planned for, or of this machine's, whichever is known first; of a fraction of a GPU
    its share. On CPUs, and for what a plan keeps on the host, it is ``resources_per_worker["memory"]``, or else, if
    Ray is connected, the memory of the largest node.

    Args:
        plan: of :func:`raymem.plan` or :func:`raymem.plan_module`.

    Returns:
        how much is left.

    Raises:
        BudgetExceeded: the worker would not fit.
        BudgetError: the plan is of another device or of more workers, or nothing says what a worker gets.
    """
    _check_alike(scaling_config, plan)
    resources = dict(scaling_config.resources_per_worker or {})
    if plan.device == "cpu":
        given, words = _host(resources)
        return _compare(plan.capacity_bytes, given, words)
    device_bytes, words = _device(scaling_config, plan)
    share = float(resources.get("GPU", 1.0))
    if share < 1:
        device_bytes, words = int(device_bytes * share), f"{share:g} of {words}"
    left = _compare(plan.capacity_bytes, device_bytes, words)
    if plan.host_bytes and ("memory" in resources or ray.is_initialized()):
        given, words = _host(resources)
        _compare(plan.host_bytes, given, f"{words}, for what it keeps on the host")
    return left


def _check_alike(scaling: ray.train.ScalingConfig, plan: Plan) -> None:
    if plan.device == "cuda" and not scaling.use_gpu:
        raise BudgetError(
            "scaling_config: use_gpu=False, but the plan is of a GPU; set use_gpu=True, or plan without a gpu"
        )
    if plan.device == "cpu" and scaling.use_gpu:
        raise BudgetError(
            "scaling_config: use_gpu=True, but the plan is of a CPU; plan with gpu=, such as gpu='H100-80GB'"
        )
    number = scaling.num_workers
    fewest = number[0] if isinstance(number, tuple) else number
    if plan.num_workers > max(1, fewest):
        raise BudgetError(
            f"scaling_config: num_workers={number}, but the plan is of {plan.num_workers} workers, whose shards of the "
            f"model are smaller; plan with scaling.num_workers={max(1, fewest)}"
        )


def _compare(needed_bytes: int, given_bytes: int, words: str) -> Fits:
    if needed_bytes > given_bytes:
        raise BudgetExceeded(
            f"scaling_config: a worker is planned to need {bytes_text(needed_bytes)}, which is "
            f"{bytes_text(needed_bytes - given_bytes)} more than it has ({words}: {bytes_text(given_bytes)}); {_CURE}"
        )
    return Fits(given_bytes - needed_bytes)


def _host(resources: dict[str, float]) -> tuple[int, str]:
    """Return the bytes of the host that a worker has, and where that is said."""
    if "memory" in resources:
        return int(resources["memory"]), "resources_per_worker['memory']"
    if ray.is_initialized():
        return int(max(node["Resources"].get("memory", 0) for node in _nodes())), "memory of the largest node"
    raise BudgetError(
        "scaling_config: nothing says how much memory a worker has; give resources_per_worker={'memory': bytes}, or "
        "call ray.init() first"
    )


def _device(scaling: ray.train.ScalingConfig, plan: Plan) -> tuple[int, str]:
    """Return the bytes of a worker's GPU, and where that is said."""
    if scaling.accelerator_type is not None:
        return _known(scaling.accelerator_type), f"accelerator_type={scaling.accelerator_type!r}"
    if ray.is_initialized() and (types := set(_accelerators())):
        smallest = min(types, key=_known)
        return _known(smallest), f"the smallest GPU of the cluster, {smallest}"
    if plan.gpu is not None:
        return GPUS[plan.gpu].capacity_bytes, f"the planned gpu={plan.gpu!r}"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "this machine's GPU"
    raise BudgetError(
        "scaling_config: nothing says which GPU a worker has; give accelerator_type, or plan with gpu='H100-80GB'"
    )


def _known(accelerator: str) -> int:
    """Return the memory of a GPU by the name that Ray has for it, such as ``A100-40G``. Raises BudgetError."""
    try:
        return GPUS[gpu_key(re.sub(r"(?<=\d)G$", "GB", accelerator))].capacity_bytes
    except BudgetError:
        raise BudgetError(
            f"scaling_config: the memory of accelerator {accelerator!r} is not known; known are {', '.join(GPUS)}; "
            "compare plan.capacity_bytes with it yourself, or use plan.fits('48GiB')"
        ) from None


def _accelerators() -> Iterator[str]:
    for node in _nodes():
        if node["Resources"].get("GPU"):
            yield from (
                name.removeprefix("accelerator_type:")
                for name in node["Resources"]
                if name.startswith("accelerator_type:")
            )


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]

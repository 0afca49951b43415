"""Decides how many workers share a model that is only used, not trained, and names their lack of memory."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from raymem.errors import BudgetExceeded, OutOfMemory
from raymem.memory.budget import bytes_text, parse_bytes
from raymem.memory.oom import is_out_of_memory
from raymem.planner.analytic import frozen_bytes
from raymem.planner.plan import outside_bytes
from raymem.planner.types import Target
from raymem.recipe.axes import BASES
from raymem.recipe.schema import Recipe, ScalingSection
from raymem.training.dist_env import DistEnv
from raymem.training.model import quantised
from raymem.training.model.build import base_dtype, load_config, on_meta
from raymem.training.model.spread import blocks_of
from raymem.training.reporter import Status

_WORK = 0.1
"""The share of a device that is left for activations, logits, keys and values."""


@dataclass(frozen=True)
class Sizes:
    """What decides how many devices hold a model, in bytes."""

    weights: int
    block: int
    """The largest transformer block."""
    rest: int
    """All that is in no block: embeddings and head."""

    @staticmethod
    def of(model: Any) -> Sizes:
        """Measure a bare transformers model, usually on the meta device."""
        blocks = [_num_bytes(block) for block in blocks_of(model)]
        weights = _num_bytes(model)
        return Sizes(weights, max(blocks, default=0), weights - sum(blocks))

    @property
    def gathered(self) -> int:
        """What each worker of FSDP2 holds above its share at most while the model runs: all that is in no block, which
        stays whole, beside a block, the copy that it was gathered in, and the next one; or that rest with its own copy.
        """
        return self.rest + max(self.rest, 3 * self.block)

    def least_workers(self, device_bytes: int, apart_bytes: int) -> int | None:
        """Return how many devices hold it together, with room to work; None if no number does.

        Args:
            device_bytes: of each.
            apart_bytes: of each that are taken by something else, where there are several.
        """
        left = int(device_bytes * (1 - _WORK)) - apart_bytes - self.gathered
        return None if left <= 0 else max(2, math.ceil(self.weights / left))

    def fits_one(self, device_bytes: int, apart_bytes: int) -> bool:
        """Say whether one device holds it, with room to work."""
        return self.weights + apart_bytes <= device_bytes * (1 - _WORK)


def sharing(recipe: Recipe, status: Status) -> ScalingSection:
    """Return the scaling with which a recipe's model is used: its own, or FSDP2 workers if one device cannot hold it.

    The memory of a device is the recipe's ``budget``, or else that of this machine's GPU. Where neither is known,
    where layers are streamed from the host, and on the CPU in this process, whose memory others would share, the
    recipe decides alone.

    Args:
        status: told of workers that the recipe does not ask for.

    Raises:
        BudgetExceeded: see :func:`shared`.
    """
    scaling, device_bytes = recipe.scaling, _device_bytes(recipe)
    if scaling.shares_model or device_bytes is None or BASES.of(recipe).is_streamed(recipe.base):
        return scaling
    model = on_meta(load_config(recipe), recipe)
    if recipe.base.quantize == "nf4":
        quantised.place(model, base_dtype(recipe), planned=True, sharded=False)
    return shared(scaling, Sizes.of(model), device_bytes, status)


def shared(scaling: ScalingSection, sizes: Sizes, device_bytes: int, status: Status) -> ScalingSection:
    """Return the scaling if one of its devices holds a model, else that of as many FSDP2 workers as hold it together.

    Where that cannot be, one device may still do, with less room than is wanted or more than a budget allows.

    Args:
        device_bytes: memory of a device.
        status: told of the workers.

    Raises:
        BudgetExceeded: no GPU of this machine holds the weights, and neither do all of them or any number of them.
    """
    alone, apart = (outside_bytes(Target("cuda" if scaling.use_gpu else "cpu", number), None) for number in (1, 2))
    if sizes.fits_one(device_bytes, alone):
        return scaling
    too_large = f"the weights take {bytes_text(sizes.weights)}, and a device has {bytes_text(device_bytes)}"
    least = sizes.least_workers(device_bytes, apart)
    num_workers = None if least is None else max(least, scaling.least_workers)
    gpus = torch.cuda.device_count() if scaling.use_gpu and not os.environ.get("RAY_ADDRESS") else None
    if num_workers is None or (gpus is not None and num_workers > gpus):
        real_bytes = gpu_bytes() if scaling.use_gpu else None
        if real_bytes is None or sizes.weights + alone <= real_bytes:
            return scaling
        if num_workers is None:
            raise BudgetExceeded(
                f"scaling: {too_large}, too little even for what each of any number of FSDP2 workers gathers "
                f"({bytes_text(sizes.gathered)}); use devices with more memory, or raise budget if it says so"
            )
        raise BudgetExceeded(
            f"scaling: {too_large}: {num_workers} FSDP2 workers would hold the model, and this machine has {gpus} "
            "GPUs; run it on a Ray cluster that has as many (RAY_ADDRESS)"
        )
    status(f"{too_large}: {num_workers} FSDP2 workers share the model")
    return scaling.model_copy(update={"num_workers": num_workers, "strategy": "fsdp2"})


def more_workers(setting: str, dist_env: DistEnv) -> str:
    """Word the setting that has more workers share a model than do here."""
    return f"{setting} {max(2, 2 * dist_env.world_size)}, so that more workers share it, each on a device of its own"


@contextlib.contextmanager
def named_memory(dist_env: DistEnv, cure: str) -> Iterator[None]:
    """Say where memory ended, and what helps.

    Args:
        cure: how the model is shared by more workers.

    Raises:
        OutOfMemory: the device or the host had none left.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        held = f"a share of 1/{dist_env.world_size} of the model" if dist_env.sharded else "the whole model"
        raise OutOfMemory(
            f"out of memory on rank {dist_env.rank} of {dist_env.world_size}, which holds {held}: {cure}"
        ) from None


def _device_bytes(recipe: Recipe) -> int | None:
    if recipe.scaling.num_workers == 0 and not recipe.scaling.use_gpu:
        return None
    if recipe.budget is not None:
        return parse_bytes(recipe.budget)
    return gpu_bytes() if recipe.scaling.use_gpu else None


def gpu_bytes() -> int | None:
    """Return the memory of this machine's first GPU; None if it has none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _num_bytes(module: torch.nn.Module) -> int:
    """Count the bytes of parameters, tied ones once."""
    return sum(frozen_bytes(parameter, 1) for parameter in module.parameters())

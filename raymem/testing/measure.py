"""Measured bytes: the peak of a recipe's own step, to hold a plan against, and what the heap has handed out.

A measured step allocates the model, so it is for models that fit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch

from raymem.memory.meter import Peak, PeakMeter, resident_tensors
from raymem.planner.tracing.step_trace import TARGETS
from raymem.recipe.schema import Recipe
from raymem.training.data.batches import Batch
from raymem.training.dist_env import DistEnv, replicate
from raymem.training.hooks import hooks_of, view_of
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater
from raymem.training.step import train_step


def measure_step(recipe: Recipe, position: int = 1) -> Peak:
    """Peak of the second optimizer step of one worker; of this rank, if there is a process group.

    Args:
        position: number of that step in a run, from 0, for methods that do more in some steps than in others.

    Raises:
        RaymemError: as training does.
    """
    dist_env = DistEnv.current(recipe)
    model: Any = build_model(recipe, dist_env)
    updater = build_updater(model, recipe)
    batches = _batches(recipe, int(model.config.get_text_config().vocab_size), dist_env)
    hooks, mixed = hooks_of(recipe, model), recipe.train.is_mixed
    view = view_of(model, lambda _: [(batch, TARGETS) for batch in batches], mixed=mixed)
    replica = model if dist_env.sharded else replicate(model, dist_env)

    def resident() -> Iterator[torch.Tensor]:
        tokens = (
            t for b in batches for t in (b.input_ids, b.labels, b.position_ids, b.attention_mask, b.target_positions)
        )
        return resident_tensors(model, [*updater.state().values(), *(t for t in tokens if t is not None)])

    def prepare(number: int) -> None:
        for hook in hooks:
            hook.before_step(number, view)

    def step(number: int) -> None:
        clip_norm = recipe.train.clip_norm
        train_step(replica, batches, TARGETS, updater, number, 1e-3, clip_norm=clip_norm, mixed=mixed)

    prepare(0)
    step(0)
    prepare(position)
    with PeakMeter(dist_env.device, resident) as meter:
        step(position)
    assert meter.peak is not None
    return meter.peak


def _batches(recipe: Recipe, vocabulary: int, dist_env: DistEnv) -> list[Batch]:
    train, length = recipe.train, recipe.data.sequence_length
    per_rank = -(-train.global_batch // dist_env.world_size)
    count = -(-per_rank // train.rows_per_pass)
    rows = -(-per_rank // count)
    source = torch.Generator().manual_seed(dist_env.rank)
    batches = []
    for _ in range(count):
        ids = torch.randint(vocabulary, (rows, length), generator=source)
        positions = mask = None
        if recipe.data.packing == "bfd":
            positions = torch.arange(length).expand(rows, -1).clone()
            positions[:, length // 2 :] -= length // 2
        elif recipe.data.packing == "none":
            mask = torch.ones(rows, length, dtype=torch.int64)
            mask[:, length - length // 8 :] = 0
        batches.append(Batch(ids, ids.clone(), positions, mask).to(dist_env.device))
    return batches


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


def heap_in_use_bytes() -> int:
    """Return bytes that glibc malloc has handed out; the difference around a forward pass is what it saved for
    backward.

    Raises:
        OSError: the C library has no ``mallinfo2`` (glibc before 2.33, musl).
    """
    libc = ctypes.CDLL(None)
    try:
        mallinfo2 = libc.mallinfo2
    except AttributeError:
        raise OSError("the C library has no mallinfo2 (glibc 2.33 or newer is needed)") from None
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)

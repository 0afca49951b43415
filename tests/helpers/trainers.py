"""What tests of other people's trainers share: the rows of a recipe in its own order, and the peak of a step."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from raymem.integrations.hf import RaymemCallback, apply
from raymem.memory.meter import PeakMeter, resident_tensors
from raymem.recipe.schema import Recipe
from raymem.training.data.batches import rank_batches
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.loop import sampler_of
from tests.helpers.support import prepare_split

Row = dict[str, torch.Tensor]


def rows_of(recipe: Recipe) -> list[Row]:
    """The rows that a run of the recipe trains on, in its order: one process, all steps."""
    rows = PackedRows(prepare_split(recipe, "train").directories)
    sampler, steps = sampler_of(recipe, rows), recipe.train.steps
    assert steps is not None and recipe.data.packing == "none"
    found = []
    for step in range(steps):
        for batch in rank_batches(rows, sampler.ids(step), 0, 1, recipe.train.rows_per_pass):
            inputs = {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}
            found += [{k: v[i] for k, v in inputs.items() if v is not None} for i in range(len(batch.labels))]
    return found


def arguments_for(recipe: Recipe, output: Any, kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> Any:
    """The arguments of a Trainer that takes the steps of a recipe."""
    train = recipe.train
    rows = train.rows_per_pass
    return kind(
        **{
            "output_dir": str(output), "max_steps": train.steps, "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": train.global_batch // rows, "max_grad_norm": train.clip_norm or 0.0,
            "lr_scheduler_type": train.schedule, "train_sampling_strategy": "sequential", "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "bf16": train.is_mixed, **more,
        }
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    """The loss of every step of a Trainer that logs each of them."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Meter(TrainerCallback):
    """Measures the peak of one step of a Trainer; stands behind raymem's callback."""

    def __init__(self, step: int = 2) -> None:
        self.step = step
        self.peak_bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if state.global_step == self.step:
            model, optimizer = parts["model"], parts["optimizer"]
            self._meter = PeakMeter(torch.device("cpu"), lambda: resident_tensors(model, state_of(optimizer)))
            self._meter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if state.global_step == self.step + 1:
            self._meter.__exit__(None, None, None)
            assert self._meter.peak is not None
            self.peak_bytes = self._meter.peak.allocated_bytes


def state_of(optimizer: Any) -> Iterable[torch.Tensor]:
    """The tensors of an optimizer's state, perhaps wrapped by accelerate."""
    values = itertools.chain.from_iterable(state.values() for state in optimizer.state.values())
    return [value for value in values if isinstance(value, torch.Tensor)]


def train_as_rank(
    recipe: Recipe, axes: Any, model: Any, output: Any, rows: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:  # fmt: skip
    """Train in a Trainer under DDP; returns losses and all tensors of the model."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    run = apply(AutoModelForCausalLM.from_pretrained(model), axes)
    callback = RaymemCallback(run)
    args = arguments_for(recipe, output, ddp_backend="gloo", average_tokens_across_devices=True)
    assert args.world_size == world
    trainer = Trainer(
        run.model, args, train_dataset=rows, data_collator=default_data_collator, callbacks=[callback],
        optimizer_cls_and_kwargs=run.optimizer_cls_and_kwargs,
    )  # fmt: skip
    trainer.train()
    assert callback.plan is not None
    return losses(trainer), dict(run.model.state_dict())

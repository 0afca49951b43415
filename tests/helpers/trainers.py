"""What tests of other people's trainers share: the rows of a recipe in its own order, and the peak of a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

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


class Meter(TrainerCallback):  # type: ignore[misc]
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

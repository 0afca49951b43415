"""raymem in Lightning.

::

    module.run = apply(model, {"adapter": "lora", "activations": "loract", "loss": "chunked", "budget": "24GiB"})
    module.model = module.run.model  # and configure_optimizers returns self.run.build_optimizer()
    L.Trainer(callbacks=[RaymemCallback(module.run)]).fit(module, loader)

Batches are what the model takes by name, with ``labels``; ``training_step`` returns ``self.model(**batch).loss``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from raymem.errors import DataError, RecipeError
from raymem.hooks import RunView
from raymem.integrations.applied import Applied, MicroBatch, apply, as_setting, asked_of, micro_batches
from raymem.integrations.budget import plan_step, refuse_above
from raymem.integrations.rows import Upcoming
from raymem.planner.types import Plan
from raymem.training.hooks import metrics_of, resume_hooks, states_of

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError:
        raise ImportError("raymem.integrations.lightning needs Lightning: pip install 'raymem[lightning]'") from None

__all__ = ["RaymemCallback", "apply"]

log = logging.getLogger(__name__)

_PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")


class RaymemCallback(Callback):  # type: ignore[misc]
    """Runs what :func:`apply` brought: its part before steps, its metrics, its state in checkpoints, and its budget.

    Args:
        run: made by :func:`apply`.

    Raises:
        RaymemError: as training starts: a trainer that contradicts the settings, or a step above the budget. Nothing
            has been trained then.
    """

    def __init__(self, run: Applied) -> None:
        self.run = run
        self.plan: Plan | None = None
        """The plan that was held against the budget, if there is one."""
        self._hooks = run.hooks()
        self._view: RunView | None = None
        self._stored: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return states_of(self._hooks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stored = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the trainer has what was applied, look at the budget, and take up a checkpoint's state."""
        run = self.run
        _refuse(trainer, pl_module, run)
        run.model.train()  # transformers loads it for evaluation, and Lightning leaves it so
        if not self._hooks and run.settings.budget_bytes is None:
            return
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise DataError(
                f"raymem: the trainer's training data is {type(loader).__name__}, and only one DataLoader can be "
                "looked into before a step; give one"
            )
        upcoming = Upcoming(loader, trainer.accumulate_grad_batches, pl_module.device)

        def ask(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
            with trainer.precision_plugin.forward_context():
                return asked_of(model, batch)

        self._view = run.view(upcoming, ask, log.info)
        if run.settings.budget_bytes is not None:
            (batch,) = micro_batches([upcoming.largest()])
            self.plan = plan_step(
                run, batch, asked_of, accumulation=trainer.accumulate_grad_batches, clip_norm=trainer.gradient_clip_val,
                mixed=trainer.precision == "bf16-mixed", optimizer=trainer.optimizers[0],
            )  # fmt: skip
            refuse_above(self.plan, run, rows=loader.batch_size or 1, names=_as_written)
        if trainer.global_step > 0:
            resume_hooks(self._hooks, self._stored, self._view, str(trainer.ckpt_path))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Run what comes before an optimizer step, with its first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()  # Lightning would hold them until the forward pass is through
        if self._view is not None:
            for hook in self._hooks:
                hook.before_step(trainer.global_step, self._view)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the figures of a step."""
        is_last = batch_idx + 1 == trainer.num_training_batches
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or is_last:
            pl_module.log_dict(metrics_of(self._hooks, trainer.global_step - 1, taken=()))


def _refuse(trainer: Any, module: Any, run: Applied) -> None:
    """Refuse a trainer that contradicts the settings, or does not train what was applied.

    Raises:
        RecipeError: says which, and the cure.
    """
    world, accumulation = trainer.world_size, trainer.accumulate_grad_batches
    run.settings.with_train(
        micro_batch=1, global_batch=accumulation * world, clip_norm=trainer.gradient_clip_val or None,
        precision="bf16_mixed" if trainer.precision == "bf16-mixed" else "fp32",
    )  # fmt: skip
    if trainer.precision not in _PRECISIONS:
        raise RecipeError(
            f"raymem: precision={trainer.precision!r} is not among the precisions of raymem's methods; use one of "
            + ", ".join(map(repr, _PRECISIONS))
        )
    strategy = type(trainer.strategy).__name__
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        raise RecipeError(
            f"raymem: {strategy} moves parameters away from under the methods; use one device or strategy='ddp', or "
            "raymem train with scaling.strategy: fsdp2"
        )
    if not module.automatic_optimization:
        raise RecipeError("raymem: with manual optimization nobody says where a step begins; use the automatic one")
    if all(part is not run.model for part in module.modules()):
        raise RecipeError("raymem: the module does not hold the model that apply() returned; keep run.model in it")
    if "optimizer" in run.settings.asked and not any(run.owns(optimizer) for optimizer in trainer.optimizers):
        raise RecipeError(
            "raymem: optimizer: the module has made its own; return run.build_optimizer() from configure_optimizers"
        )


def _as_written(override: str) -> str | None:
    path, _, value = override.partition("=")
    return f"batch_size={value} in the DataLoader" if path == "train.micro_batch" else as_setting(override)

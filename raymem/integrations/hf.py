"""raymem in Hugging Face's ``Trainer`` and TRL's ``SFTTrainer``.

::

    run = apply(model, {"adapter": "moram", "activations": "loract", "loss": "chunked", "budget": "24GiB"})
    trainer = Trainer(run.model, args, train_dataset=rows, callbacks=[RaymemCallback(run)])
    trainer.train()

An optimizer that is asked for goes in as ``optimizer_cls_and_kwargs=run.optimizer_cls_and_kwargs``.
"""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from raymem.errors import RecipeError
from raymem.hooks import RunView
from raymem.integrations.applied import Applied, Ask, MicroBatch, apply, as_setting, asked_of, base_of, micro_batches
from raymem.integrations.budget import plan_step, refuse_above
from raymem.integrations.rows import Upcoming
from raymem.memory.budget import bytes_text
from raymem.planner.types import Plan
from raymem.training.hooks import metrics_of, resume_hooks, states_of

__all__ = ["RaymemCallback", "apply"]

log = logging.getLogger(__name__)

_STATE = "raymem"
"""The key of our part of ``trainer_state.json``, among those of callbacks."""
_FUSED = "fused_lm_head"
"""The argument by which TRL's trainers ask a model for log-probabilities without logits."""
_ARGUMENTS = {
    "train.micro_batch": "per_device_train_batch_size",
    "train.global_batch": "gradient_accumulation_steps",
    "train.clip_norm": "max_grad_norm (0 for null)",
}
"""Key of a recipe -> the argument of a Trainer that decides it."""


class RaymemCallback(TrainerCallback):  # type: ignore[misc]
    """Runs what :func:`apply` brought: its part before steps, its metrics, its state in checkpoints, and its budget.

    Metrics are added to the Trainer's own logs; trackers get them that stand behind this callback in ``callbacks``.

    Args:
        run: made by :func:`apply`.

    Raises:
        RaymemError: while the Trainer is built or begins to train: arguments that contradict the settings, or a step
            above the budget; nothing has been trained then. After the first step: it did not use the loss.
    """

    def __init__(self, run: Applied) -> None:
        self.run = run
        self.plan: Plan | None = None
        """The plan that was held against the budget, if there is one."""
        self._hooks = run.hooks()
        self._view: RunView | None = None
        self._figures: dict[str, float] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Check the Trainer's arguments, and take over its learning rate."""
        _refuse_steps(args, self.run)
        _refuse_arguments(args, self.run)
        self.run.trainer_lr = args.learning_rate

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Check that the Trainer has what was applied, look at the budget, and take up a checkpoint's state."""
        run, model, loader = self.run, parts["model"], parts["train_dataloader"]
        _refuse_parts(run, model, parts["optimizer"])
        ask = self._asking()
        upcoming = Upcoming(loader, args.gradient_accumulation_steps, args.device)
        self._view = run.view(upcoming, ask, log.info)
        if run.settings.budget_bytes is not None:
            self._check_budget(args, upcoming, ask, parts["optimizer"])
        if state.global_step > 0:
            stored = state.stateful_callbacks.get(_STATE, {})
            resume_hooks(self._hooks, stored, self._view, args.output_dir)

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Run what comes before an optimizer step."""
        assert self._view is not None
        self.run.model.train()
        for hook in self._hooks:
            hook.before_step(state.global_step, self._view)

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Collect the figures of a step, and the state that a checkpoint of it would hold."""
        if self.run.loss_calls is not None and not self.run.loss_calls and not self._is_fused():
            raise RecipeError(
                "raymem: loss: the trainer computes its loss without asking the model for it (compute_loss_func, or a "
                "compute_loss of its own), so raymem's would not be used; leave loss out"
            )
        self._figures |= metrics_of(self._hooks, state.global_step - 1, taken=())
        if states := states_of(self._hooks):
            state.stateful_callbacks[_STATE] = states

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **parts: Any) -> None:
        """Put the figures since the last log beside the Trainer's."""
        if logs is not None and "loss" in logs:
            logs |= self._figures
            if state.log_history:
                state.log_history[-1] |= self._figures
            self._figures = {}

    def _check_budget(self, args: Any, upcoming: Upcoming, ask: Ask, optimizer: Any) -> None:
        (batch,) = micro_batches([upcoming.largest()])
        self.plan = plan_step(
            self.run, batch, ask, accumulation=args.gradient_accumulation_steps,
            clip_norm=args.max_grad_norm or None, mixed=args.bf16, optimizer=optimizer,
        )  # fmt: skip
        refuse_above(self.plan, self.run, rows=args.per_device_train_batch_size, names=_as_argument)
        log.info(
            "raymem: a step is predicted to take %s of %s", bytes_text(self.plan.capacity_bytes),
            self.run.settings.recipe.budget,
        )  # fmt: skip

    def _is_fused(self) -> bool:
        """Say whether the trainer has given the model a head that makes no logits of whole rows, as TRL's do."""
        forward = self.run.base.__dict__.get("forward")
        while forward is not None:  # accelerate may have wrapped it for mixed precision
            if _FUSED in inspect.signature(forward, follow_wrapped=False).parameters:
                return True
            forward = getattr(forward, "__wrapped__", None)
        return False

    def _asking(self) -> Ask:
        """Return how the trainer asks the model for its loss."""
        if not self._is_fused():
            return asked_of
        if self.run.loss_calls is not None:
            if not self.run.loss_is_chunked:
                raise RecipeError(
                    "raymem: loss: this trainer computes the loss itself, without the logits of whole rows; leave loss "
                    "out"
                )
            log.info("raymem: the loss in chunks is taken by the trainer's own head")
        return _asked_of_fused_head


def _asked_of_fused_head(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Ask a model with TRL's fused head for the loss of a micro-batch, as ``SFTTrainer`` does."""
    outputs: Any = model(**{**batch.inputs, "use_cache": False, _FUSED: True})
    loss: torch.Tensor = -outputs.log_probs.sum() / max(1, batch.total)
    return loss


def _refuse_steps(args: Any, run: Applied) -> None:
    """Hold the settings against the steps of a Trainer, by the rules of recipes.

    Raises:
        RecipeError: names the rule, and the Trainer's arguments for the keys in it.
    """
    rows = args.per_device_train_batch_size
    try:
        run.settings.with_train(
            micro_batch=rows, global_batch=rows * args.gradient_accumulation_steps,
            clip_norm=args.max_grad_norm or None, precision="bf16_mixed" if args.bf16 else "fp32",
        )  # fmt: skip
    except RecipeError as error:
        theirs = [f"{key} is {own}" for key, own in _ARGUMENTS.items() if key in str(error)]
        raise RecipeError(f"{error} (here {', '.join(theirs)})" if theirs else str(error)) from None


def _refuse_arguments(args: Any, run: Applied) -> None:
    """Refuse arguments of a Trainer that contradict the settings, or that no method is tried with.

    Raises:
        RecipeError: names the argument and the cure.
    """
    asked, options = run.settings.asked, run.settings.recipe.optimizer
    refused = []
    if "activations" in asked and (getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing):
        refused.append(
            "gradient_checkpointing=True and activations both decide what backward keeps; set gradient_checkpointing="
            "False (SFTConfig turns it on by itself), or leave activations out"
        )
    if "loss" in asked and args.label_smoothing_factor:
        refused.append("label_smoothing_factor needs the logits of whole rows; set it to 0, or leave loss out")
    if "loss" in asked and args.use_liger_kernel:
        refused.append("use_liger_kernel=True brings a loss of its own; set it to False, or leave loss out")
    if args.torch_compile and asked - {"optimizer"}:
        refused.append("torch_compile=True is not tried with forward passes of raymem's; set it to False")
    if args.fp16:
        refused.append("fp16=True is not among the precisions of raymem's methods; set bf16=True, or neither")
    if args.deepspeed or args.fsdp:
        refused.append(
            "deepspeed and fsdp move parameters away from under the methods; use one process or DDP, or raymem train "
            "with scaling.strategy: fsdp2"
        )
    if args.n_gpu > 1:
        refused.append(
            "several GPUs in one process (DataParallel) copy the model in every step; start with torchrun or "
            "accelerate launch, or show it one GPU: CUDA_VISIBLE_DEVICES=0"
        )
    if "optimizer" in asked:
        defaults = type(args).__dataclass_fields__
        rate, usual = args.learning_rate, defaults["learning_rate"].default
        if run.settings.has_lr and not _same(rate, usual) and not _same(rate, options.lr):
            refused.append(f"learning_rate={rate} and optimizer.lr: {options.lr} differ; give one of the two")
        decay = getattr(options, "weight_decay", args.weight_decay)
        if not _same(args.weight_decay, defaults["weight_decay"].default) and not _same(args.weight_decay, decay):
            refused.append(
                f"weight_decay={args.weight_decay} is not what raymem's optimizer takes; set optimizer.weight_decay to "
                "it"
            )
    if refused:
        raise RecipeError("\n".join(f"raymem: {line}" for line in refused))


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9)


def _refuse_parts(run: Applied, model: Any, optimizer: Any) -> None:
    """Refuse a Trainer that does not train what was applied.

    Raises:
        RecipeError: says what it was not given.
    """
    if model is not run.model:
        both = base_of(model) is run.base
        raise RecipeError(
            "raymem: the trainer trains another model than apply() returned; "
            + ("leave peft_config out and ask for the adapter in apply()" if both else "give it run.model")
        )
    if "optimizer" in run.settings.asked and not run.owns(optimizer):
        raise RecipeError(
            "raymem: optimizer: the trainer has made its own; give it optimizer_cls_and_kwargs="
            "run.optimizer_cls_and_kwargs"
        )


def _as_argument(override: str) -> str | None:
    """Return an override of a recipe as a setting of :func:`apply` or an argument of the Trainer; None if neither."""
    path, _, value = override.partition("=")
    return f"per_device_train_batch_size={value}" if path == "train.micro_batch" else as_setting(override)

"""Lets a kind of an axis take part in a run beyond the model that it builds: before steps, in metrics, in checkpoints.

The loop calls the hooks of a recipe and stores their state with every checkpoint; the planner calls the same hooks on
tensors without values. Neither knows what they do, and hooks know neither of the two, only a :class:`RunView`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class RunView:
    """A run as its hooks see it; alike in training and in a plan."""

    model: nn.Module
    """The model with its adapter; sharded under FSDP2, not wrapped by DDP."""
    batches: Callable[[int], list[Any]]
    """Given a step (from 0): this worker's micro-batches of its global batch, on the worker's device. Every worker has
    equally many. In a plan two stand for any number, and they are the same for every step."""
    loss: Callable[[nn.Module, Any], torch.Tensor]
    """Given a model and a micro-batch: what the micro-batch adds to the mean loss of its global batch; a forward pass,
    0-dim. A collective if the model is sharded."""
    planned: bool = False
    """Whether tensors are fake: they have shapes but no values, and only memory counts."""
    doing: Callable[[str], None] = field(default=lambda what: None, repr=False, compare=False)
    """Tells people in a few words what a hook begins that takes much longer than a step."""


class Hook:
    """Base of all hooks; every method does nothing until it is overridden.

    All ranks of a run have the same hooks and call them alike, so that a hook may use collectives. What it decides must
    be a function of the seed, the step, the model, the batches and its own state, or a resumed run is another one.
    """

    name: ClassVar[str]
    """The key of the state in checkpoints; no other hook of a recipe has the same."""

    def before_step(self, step: int, run: RunView) -> None:
        """Prepare optimizer step ``step`` (from 0). Gradients are empty and must be left so.

        The global random stream is seeded for this step before the first hook, and again behind the last one. A plan
        calls this twice, with 0 and with 1, which stands for all later steps: whatever holds the most memory in any of
        them is to be done there, and nothing may depend on a value.
        """

    def metrics(self, step: int) -> dict[str, float]:
        """Return figures of a step that has just been taken, for its row of metrics; equal on all ranks."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs besides trained tensors, in values of JSON; equal on all ranks.

        Empty for a hook that has no such state; a hook that has some says so before the first step too.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; called before :meth:`resumed` if the checkpoint has such a state."""

    def resumed(self, run: RunView) -> None:
        """Continue a run from a checkpoint, whose tensors are in the model by now."""

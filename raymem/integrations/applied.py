"""Brings raymem's axes to a model that somebody else's trainer has, and holds what the trainer's callback needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raymem.errors import DataError, RecipeError
from raymem.hooks import Hook, RunView
from raymem.integrations.labels import answer_labels, targets_of
from raymem.integrations.rows import Upcoming
from raymem.integrations.settings import AXES, Settings, SettingsLike, read_settings
from raymem.kinds import IGNORED, AttachContext, OptimizerContext
from raymem.recipe.axes import ACTIVATIONS, ADAPTERS, LOSSES, MEMORY_AXES, OPTIMIZERS
from raymem.training.loss import Targets, loss_of
from raymem.training.model.adapter import read_adapter, tensors_of
from raymem.training.model.experts import shown_to_peft
from raymem.training.model.weights import slots

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of a trainer, as hooks and plans see it."""

    inputs: dict[str, Any]
    """Keyword arguments of the model, with ``labels``."""
    count: int
    """Its targets."""
    total: int
    """The targets of its global batch, over all workers."""
    targets: Targets | None = None
    """Stands in a plan for what would be found in the labels, which have no values there."""


Ask = Callable[[nn.Module, MicroBatch], torch.Tensor]
"""Given a model and a micro-batch: what it adds to the mean loss of its global batch."""


@dataclass
class Applied:
    """A model with raymem's axes, made by :func:`apply`."""

    model: Any
    """The model to train: the one that was given, or what PEFT wrapped around it."""
    settings: Settings
    loss_calls: list[int] | None
    """Gets a 1 with each call that raymem's loss answered; None if the loss is not raymem's."""
    loss_is_chunked: bool
    trainer_lr: float | None = None
    """The learning rate that the trainer has of its own, once its callback knows that."""
    _optimizer: Any = field(default=None, repr=False)

    @property
    def base(self) -> Any:
        """The model of transformers, without what PEFT wrapped around it."""
        return base_of(self.model)

    @property
    def optimizer_cls_and_kwargs(self) -> tuple[Any, dict[str, Any]]:
        """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes.

        Raises:
            RecipeError: no optimizer was asked for.
        """
        self._require_optimizer()

        def factory(*groups: Any) -> Any:
            """Return a function of the model, to which axolotl gives its arguments too; older releases of transformers
            call this itself, with groups of parameters that have no names."""
            return self.build_optimizer() if groups else lambda model, *arguments: self.build_optimizer(model)

        return factory, {}

    def build_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer that was asked for, over the trained parameters.

        Its learning rate is ``optimizer.lr`` of the settings, else the trainer's, else the kind's. Weights that are all
        bf16 are rounded at random, where the kind can do that, or updates below a rounding step would be lost.

        Args:
            model: by default the model that was applied to.

        Raises:
            RecipeError: no optimizer was asked for, or an option that does not go with the model.
        """
        self._require_optimizer()
        self._optimizer = self.optimizer_over(self.model if model is None else model)
        return self._optimizer  # type: ignore[no-any-return]

    def optimizer_over(self, model: nn.Module) -> Any:
        """Build the optimizer over a copy of the model; it is not the one that :meth:`owns` knows."""
        recipe = self.settings.recipe
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kind = OPTIMIZERS.of(recipe)
        rounds = kind.rounds and bool(named) and all(p.dtype == torch.bfloat16 for p in named.values())
        embeddings = frozenset(
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        )
        optimizer = kind.build(named, recipe.optimizer, OptimizerContext(recipe.seed, rounds, embeddings))
        if self.trainer_lr is not None and not self.settings.has_lr:
            for group in optimizer.param_groups:
                group["lr"] = self.trainer_lr
        return optimizer

    def owns(self, optimizer: Any) -> bool:
        """Say whether an optimizer, perhaps wrapped by accelerate or Lightning, is the one that was built here."""
        return self._optimizer is not None and getattr(optimizer, "optimizer", optimizer) is self._optimizer

    def hooks(self, model: nn.Module | None = None) -> list[Hook]:
        """Return the hooks of what was asked for, over the model or a copy of it."""
        recipe, asked = self.settings.recipe, self.settings.asked
        return [
            hook
            for name, axis in MEMORY_AXES.items()
            if name in asked
            for hook in axis.of(recipe).hooks(
                getattr(recipe, name), self.model if model is None else model, recipe.seed
            )
        ]

    def view(self, upcoming: Upcoming, ask: Ask, doing: Callable[[str], None]) -> RunView:
        """Return the view of a trainer's run that hooks get."""
        return RunView(self.model, lambda step: micro_batches(upcoming.of_step(step)), ask, doing=doing)

    def _require_optimizer(self) -> None:
        if "optimizer" not in self.settings.asked:
            raise RecipeError("raymem: optimizer: none was asked for; name one, or let the trainer have its own")


def apply(model: Any, settings: SettingsLike) -> Applied:
    """Bring axes of a recipe to a loaded model: adapter, activations, loss and optimizer, those that are asked for.

    Args:
        model: of transformers (for ``loss`` and ``adapter`` a causal language model), on its device; perhaps wrapped
            by PEFT.
        settings: ``{"adapter": ..., "activations": ..., "loss": ..., "optimizer": ...}`` with any of these sections as
            a recipe has them, and ``budget`` (``24GiB``) and ``seed``; or a YAML file of them; or a recipe.

    Returns:
        The model to train, as ``.model``, and what the trainer is to be given.

    Raises:
        RaymemError: a section or option that is unknown, makes no sense here, or does not go with the model.
    """
    read = read_settings(settings, has_adapter=hasattr(model, "peft_config"))
    recipe, asked = read.recipe, read.asked
    if "activations" in asked:
        ACTIVATIONS.of(recipe).prepare(base_of(model), recipe.activations)
    if "adapter" in asked:
        model = _attach(model, read)
    calls = None
    if "loss" in asked:
        calls = answer_labels(model, base_of(model), LOSSES.of(recipe), recipe.loss)
    if "activations" in asked:
        ACTIVATIONS.of(recipe).install(model, recipe.activations, recipe.seed)
    chunked = calls is not None and loss_of(model).chunked
    return Applied(model, read, calls, chunked)


def base_of(model: Any) -> Any:
    """Return the model of transformers in what PEFT may have wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def _attach(model: Any, settings: Settings) -> Any:
    """Attach the adapter to a loaded model, and give its tensors their start, as a run of raymem's own does."""
    recipe = settings.recipe
    kind = ADAPTERS.of(recipe)
    of_base = {id(tensor) for tensor in tensors_of(model).values()}
    config = getattr(model, "config", None)
    context = AttachContext(
        torch.float32,  # else bf16 factors would lose every update smaller than a rounding step
        getattr(config, "_name_or_path", None) or None,
        getattr(config, "_commit_hash", None),
    )
    with shown_to_peft(model):
        wrapped = kind.attach(model, recipe.adapter, context)
    added = {name for name, tensor in tensors_of(wrapped).items() if id(tensor) not in of_base}
    source = kind.source(recipe.adapter)
    given = {} if source is None else read_adapter(source, wrapped, recipe)
    for name, (module, attribute) in slots(wrapped).items():
        if name not in added:
            continue
        tensor = getattr(module, attribute)
        value = given.get(name)
        if value is None:
            value = kind.initial_value(name, tensor.shape, recipe.seed)
        value = value.to(_device_of(wrapped, name), tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            setattr(module, attribute, nn.Parameter(value, requires_grad=tensor.requires_grad))
        else:
            setattr(module, attribute, value)
    kind.loaded(wrapped, recipe.adapter, recipe.seed)
    return wrapped


def _device_of(model: nn.Module, name: str) -> torch.device:
    """Return the device of the layer that a tensor was added to."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        for parameter in model.get_submodule(path).parameters() if path else model.parameters():
            if parameter.device.type != "meta":
                return parameter.device
    return torch.device("cpu")


def micro_batches(batches: Sequence[Any]) -> list[MicroBatch]:
    """Return the micro-batches of a step; a collective, where there are several workers.

    Raises:
        DataError: they hold no labels.
    """
    counts = [_count(batch) for batch in batches]
    total = torch.tensor(sum(counts))
    if dist.is_initialized() and dist.get_world_size() > 1:
        total = total.to(next(v.device for v in batches[0].values() if isinstance(v, torch.Tensor)))
        dist.all_reduce(total)
    return [MicroBatch(batch, count, int(total)) for batch, count in zip(batches, counts, strict=True)]


def _count(batch: Any) -> int:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
        held = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(
            f"the trainer's batches hold no labels [rows, tokens] but {held}, so that nothing can be chosen or planned "
            "by their loss; let its collator add labels, or choose options that need no data and leave budget out"
        )
    if "shift_labels" in batch:
        return int((batch["shift_labels"] != IGNORED).sum())
    return int((labels[:, 1:] != IGNORED).sum())


def with_targets(batch: MicroBatch) -> MicroBatch:
    """Return a micro-batch with its targets beside its labels."""
    shifted = "shift_labels" in batch.inputs
    return MicroBatch(
        batch.inputs, batch.count, batch.total,
        targets_of(batch.inputs["shift_labels" if shifted else "labels"], shifted=shifted),
    )  # fmt: skip


def asked_of(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Ask a model for its own or raymem's loss of a micro-batch; see :data:`Ask`."""
    inputs = {**batch.inputs, "use_cache": False}
    if batch.targets is not None:
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")} | {"targets": batch.targets}
    loss: torch.Tensor = model(**inputs).loss  # the mean over the targets of the micro-batch
    return loss * (batch.count / max(1, batch.total))


def as_setting(override: str) -> str | None:
    """Return an override of a recipe as :func:`apply` takes it; None if that is not a setting of it."""
    path, _, value = override.partition("=")
    section, _, option = path.partition(".")
    if section not in AXES:
        return None
    return f'"{section}": {{"{option}": "{value}"}}' if option else f'"{section}": "{value}"'

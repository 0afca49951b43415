"""Traces a session: a recipe's model on fake tensors, through two real steps, an evaluation and a save.

The first step creates the optimizer state, so it is the second that has the whole footprint. On one worker nothing else
tells the two apart, and the state is made as a resumed run makes it; sharded and replicated models take both steps,
because gathering and reducing settle in the first.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from raymem.linalg.local import local
from raymem.memory import kernels
from raymem.memory.target import planned_for
from raymem.memory.trace import Change, LimitPassed, Phase, Tracer
from raymem.planner.analytic import closed_form
from raymem.planner.tracing.fake import CudaAutocast, fake_bytes, fakeify, gradients_named, quantisation_tensors, shims
from raymem.planner.tracing.fake_cache import OutputCache
from raymem.planner.tracing.fake_ddp import FakeDDP
from raymem.planner.tracing.tied_gradients import TiedGradients
from raymem.planner.types import RowFacts, Target
from raymem.private_apis import FakeStore, FakeTensorMode
from raymem.recipe.axes import building
from raymem.recipe.schema import Recipe
from raymem.training.data.batches import Batch
from raymem.training.dist_env import DistEnv
from raymem.training.hooks import hooks_of, view_of
from raymem.training.loss import forward_loss_sum, loss_of
from raymem.training.model.build import build_model, load_config
from raymem.training.model.summary import what_is_trained
from raymem.training.optim import Updater, build_updater
from raymem.training.step import train_step

MEASURED = 2
"""The number of the step that counts, from 1."""
_EVERY = sys.maxsize
"""Stands for as many targets as the rows have room for."""
TARGETS = 1000
"""Target tokens of a global batch; the number changes nothing but the loss."""


@dataclass(frozen=True)
class StepTrace:
    """The recording of a traced session."""

    changes: list[Change]
    state: dict[str, int]
    """Bytes of weights, trainable, gradients and optimizer of one worker by category, when all are there."""
    rehearsed: bool
    """Whether step 1 ran too; otherwise only its optimizer state was created."""
    loss_note: str | None
    """Why the loss is not taken in chunks although the recipe leaves that open."""
    trained: list[str] = field(default_factory=list)
    """Lines that say what is trained, quantised and left alone."""


def trace_step(
    recipe: Recipe, target: Target, rows: RowFacts | None = None, limit_bytes: int | None = None
) -> StepTrace:
    """Run the recipe's step on fake tensors. Patches libraries and starts a fake process group: one per process.

    Args:
        rows: of the recipe's data; see :func:`raymem.planner.plan_recipe`.
        limit_bytes: end with the first phase whose peak is above this, or before all of them if weights, gradients
            and states together are.

    Raises:
        RaymemError: the recipe does not go with its model.
        LimitPassed: see ``limit_bytes``; of the phase ``load`` for what is always there.
        Exception: whatever model code raises that decides by values.
    """
    recipe = _on_cpu(recipe)
    grouped = target.num_workers > 1 or recipe.scaling.strategy == "fsdp2"
    if grouped:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=target.num_workers)
    try:
        dist_env = DistEnv(0, target.num_workers, 0, torch.device("cpu"), recipe.scaling.strategy)
        with planned_for(target.kind):
            return _trace(recipe, target, rows or RowFacts(True, _EVERY), dist_env, limit_bytes)
    finally:
        if grouped:
            dist.destroy_process_group()


def planned_model(recipe: Recipe, dist_env: DistEnv | None = None) -> nn.Module:
    """Build the recipe's model on the meta device; a config with pruned layers gives the pruned model.

    Raises:
        RaymemError: as building does.
    """
    with building(load_config(recipe)):
        return build_model(recipe, dist_env, meta=True, planned=True)


def _on_cpu(recipe: Recipe) -> Recipe:
    """Return the recipe as far as fake CPU tensors can take it."""
    if recipe.model.attention != "flash_attention_2":
        return recipe
    # PyTorch's own fused attention holds the same for backward, and needs no package here.
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": "sdpa"})})


def _trace(recipe: Recipe, target: Target, rows: RowFacts, dist_env: DistEnv, limit_bytes: int | None) -> StepTrace:
    unwrapped = planned_model(recipe, dist_env)
    trained = [str(line) for line in what_is_trained(unwrapped, recipe)]
    if limit_bytes is not None:
        held = sum(closed_form(recipe, target, unwrapped).values())
        if held > limit_bytes:
            raise LimitPassed(held, "load")
    flash = recipe.model.attention == "flash_attention_2"
    with contextlib.ExitStack() as stack:
        stack.enter_context(shims(one_segment_per_row=recipe.data.packing != "bfd" or flash or not rows.masked))
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        call = TiedGradients(OutputCache(mode), unwrapped)
        tracer = stack.enter_context(Tracer(kernels.workspace(target.kind), call, host_is_device=target.kind == "cpu"))
        if target.kind == "cuda" and recipe.train.precision == "bf16_mixed":
            stack.enter_context(CudaAutocast())
        fakeify(unwrapped, tracer)
        updater = build_updater(unwrapped, recipe)
        for name, master in updater.masters.items():
            tracer.adopt(local(master), "trainable", f"{name} (fp32 master)")
        for handle in tracer.watch(unwrapped):
            stack.callback(handle.remove)
        runner = _Runner(recipe, rows, dist_env, tracer, unwrapped, updater)
        runner.run(limit_bytes)
        state = runner.state_bytes()
        changes = list(tracer.changes)
    return StepTrace(changes, state, runner.rehearsed, loss_of(unwrapped).note, trained)


class _Runner:
    """Runs one worker's part, phase by phase."""

    def __init__(
        self, recipe: Recipe, rows: RowFacts, dist_env: DistEnv, tracer: Tracer, unwrapped: nn.Module, updater: Updater
    ) -> None:
        self.recipe, self.rows, self.dist_env, self.tracer = recipe, rows, dist_env, tracer
        self.unwrapped, self.updater = unwrapped, updater
        self.mixed = recipe.train.precision == "bf16_mixed"
        self.hooks = hooks_of(recipe, unwrapped)
        self.gradient_bytes = 0
        self.rehearsed = dist_env.world_size > 1 or dist_env.sharded

    def run(self, limit_bytes: int | None) -> None:
        single = self.dist_env.sharded or self.dist_env.world_size == 1
        self.model = self.unwrapped if single else FakeDDP(self.unwrapped, self.tracer)
        batches = [self._batch() for _ in range(self._num_batches())]
        self.tracer.limit_bytes = limit_bytes
        self._before_step(0, 0, batches[:2])
        self.tracer.limit_bytes = None  # the first step does not count
        if self.rehearsed:
            with gradients_named(self.updater.parameters, self.tracer):
                self._step(1, 0, batches[:1])
        else:
            self._create_state()
        self.tracer.limit_bytes = limit_bytes
        with gradients_named(self.updater.parameters, self.tracer):
            self._before_step(MEASURED, 1, batches[:2])
            # More micro-batches than two repeat the second; their tokens are there all the same.
            self._step(MEASURED, 1, batches[:2])
        if self.recipe.data.eval is not None:
            self._evaluate(batches[0])
        self._save()

    def _create_state(self) -> None:
        self.tracer.step, self.tracer.phase = 1, "step"
        self.updater.allocate_state()
        self._adopt_state()

    def _num_batches(self) -> int:
        """Count a worker's micro-batches per step, as :func:`raymem.training.data.batches.rank_batches` cuts them."""
        train = self.recipe.train
        per_rank = -(-train.global_batch // self.dist_env.world_size)
        return -(-per_rank // train.rows_per_pass)

    def _batch(self) -> Batch:
        """Build rows as the data would give them."""
        train, data = self.recipe.train, self.recipe.data
        per_rank = -(-train.global_batch // self.dist_env.world_size)
        rows = -(-per_rank // self._num_batches())

        def tokens(what: str) -> torch.Tensor:
            token_tensor = torch.empty(rows, data.sequence_length, dtype=torch.int64)
            self.tracer.adopt(token_tensor, "activations", f"batch ({what})")
            return token_tensor

        positions = tokens("position ids") if data.packing == "bfd" else None
        # transformers looks into a mask and goes on without one that hides nothing; here no value can be looked at
        mask = tokens("attention mask") if data.packing == "none" and self.rows.masked else None
        most = rows * (data.sequence_length - 1)
        targets = torch.empty(min(self.rows.most_targets, most), dtype=torch.int64)
        self.tracer.adopt(targets, "activations", "batch (target positions)")
        return Batch(tokens("input ids"), tokens("labels"), positions, mask, targets)

    def _before_step(self, number: int, position: int, batches: list[Batch]) -> None:
        self.tracer.step, self.tracer.phase = number, "before_step"
        view = view_of(
            self.unwrapped, lambda _: [(batch, TARGETS) for batch in batches], mixed=self.mixed, planned=True
        )
        for hook in self.hooks:
            hook.before_step(position, view)

    def _step(self, number: int, position: int, batches: list[Batch]) -> None:
        self.tracer.step = number

        def phase(name: Phase) -> None:
            self.tracer.phase = name

        def guard(loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
            self.gradient_bytes = 0
            for name, tensor in self.updater.updated.items():
                if tensor.grad is not None:
                    gradient = local(tensor.grad)
                    self.gradient_bytes += gradient.numel() * gradient.element_size()
                    self.tracer.adopt(gradient, "gradients", f"{name} (gradient)")

        train_step(
            self.model, batches, TARGETS, self.updater, position, 1e-3,
            clip_norm=self.recipe.train.clip_norm, mixed=self.mixed, guard=guard, phase=phase,
        )  # fmt: skip
        self._adopt_state()

    def _adopt_state(self) -> None:
        for name, parameter in self.updater.updated.items():
            for key, value in self.updater.optimizer.state.get(parameter, {}).items():
                self.tracer.adopt(local(value), "optimizer", f"{name} ({key})")

    @torch.no_grad()
    def _evaluate(self, batch: Batch) -> None:
        self.tracer.step, self.tracer.phase = MEASURED, "evaluation"
        self.model.eval()
        forward_loss_sum(self.model, batch, mixed=self.mixed).double()
        self.model.train()

    def _save(self) -> None:
        """Trace a save: a checkpoint writes each worker's part; only the export gathers weights, one at a time."""
        self.tracer.step, self.tracer.phase = MEASURED, "save"
        for parameter in self.updater.parameters.values():
            if isinstance(parameter, DTensor):
                self.tracer.passing(parameter.numel() * parameter.element_size(), "export")

    def state_bytes(self) -> dict[str, int]:
        """Measure the terms that have a closed form, for the cross-check (:mod:`raymem.planner.analytic`)."""

        def held(tensors: Iterable[torch.Tensor]) -> int:
            return fake_bytes(tensor for tensor in tensors if not self.tracer.is_apart(local(tensor)))

        frozen = [p for p in self.unwrapped.parameters() if not p.requires_grad]
        scales = [tensor for parameter in frozen for tensor in quantisation_tensors(parameter)]
        moments = [v for p in self.updater.updated.values() for v in self.updater.optimizer.state.get(p, {}).values()]
        return {
            "weights": held([*frozen, *scales, *self.unwrapped.buffers()]),
            "trainable": held([*self.updater.parameters.values(), *self.updater.masters.values()]),
            "gradients": self.gradient_bytes,
            "optimizer": held(moments),
        }

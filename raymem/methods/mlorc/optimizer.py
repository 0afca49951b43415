"""MLorc optimizers: ordinary ``torch.optim.Optimizer`` shells around the step of :mod:`raymem.methods.mlorc.update`."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from raymem.errors import NonFiniteError
from raymem.linalg import LowRank, stochastic_round
from raymem.linalg.local import local
from raymem.methods.mlorc import plain, sharding
from raymem.methods.mlorc.config import MLorcAdamWOptions, MLorcLionOptions
from raymem.methods.mlorc.eligibility import StateSummary, is_compressed
from raymem.methods.mlorc.update import Matrix, Momentum, adamw_step, lion_step
from raymem.seeds import generator

log = logging.getLogger(__name__)

STATE_VERSION = 1
FACTOR_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
State = dict[str, torch.Tensor]


class MLorcOptimizer(torch.optim.Optimizer, abc.ABC):
    """Base of both optimizers: groups, state, checks, and the walk over the parameters."""

    options_class: ClassVar[type[MLorcAdamWOptions] | type[MLorcLionOptions]]
    moments: ClassVar[tuple[str, ...]]
    """Names of the moments; as factors they are ``<name>.left`` [M, R] and ``<name>.right`` [R, N] in the state."""

    def __init__(
        self, params: Params, defaults: dict[str, Any], seed: int, stochastic_rounding: bool, check_finite: bool
    ) -> None:
        self._seed = seed
        self._stochastic_rounding = stochastic_rounding
        self._check_finite = check_finite
        self._names: dict[int, str] = {}
        self._group_of: dict[int, int] = {}
        self._squared_norms: dict[int, torch.Tensor] = {}
        self.steps_in_backward = False
        super().__init__(params, {**defaults, "step": 0, "version": STATE_VERSION})
        log.info("%s", self.summary())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; options that are not given are the defaults.

        Raises:
            ValueError: an option out of range, a rank above a matrix's shorter side, or a complex parameter.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        index = len(self.param_groups) - 1
        names = group.get("param_names") or [f"group {index} parameter {i}" for i in range(len(group["params"]))]
        self._check_options(group)
        for name, parameter in zip(names, group["params"], strict=True):
            if not parameter.dtype.is_floating_point:
                raise ValueError(f"{name}: parameters of dtype {parameter.dtype} are not supported; floats are")
            is_compressed(name, parameter.shape, group)
            self._names[id(parameter)] = name
            self._group_of[id(parameter)] = index

    def _check_options(self, group: dict[str, Any]) -> None:
        names = {field.name for field in dataclasses.fields(self.options_class)}
        options = {name: value for name, value in group.items() if name in names}
        options["lr"], options["betas"] = float(group["lr"]), tuple(group["betas"])
        if group["rank"] is None:
            del options["rank"]
        self.options_class(**options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step from the gradients that are there; parameters without one are left alone.

        Raises:
            NonFiniteError: a gradient with NaN or infinity; nothing has been changed.
            ValueError: a sparse gradient; nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_bad_gradients([p for _, p in self._walk() if p.grad is not None], "nothing was updated")
        for group, parameter in self._walk():
            if parameter.grad is not None:
                self._update(parameter, group)
        for group in self.param_groups:
            group["step"] += 1
        self._squared_norms.clear()
        return loss

    @torch.no_grad()
    def allocate_state(self) -> None:
        """Create what is missing of the state, all zero, for a checkpoint to be read into."""
        for group, parameter in self._walk():
            if not self.state[parameter]:
                self._begin(parameter, group)

    def step_in_backward(self) -> None:
        """From now on update each parameter as soon as backward has its gradient, and free that gradient at once.

        One gradient is alive at a time, then. :meth:`step` is still called after every backward pass; set the learning
        rate before it. What needs all gradients together cannot work: clipping by their norm (there are none left to
        clip), accumulation over several backward passes (refused), a GradScaler, and DDP on several ranks (refused;
        FSDP2 does). A NaN is found before its own parameter is written, but others may have been updated.

        Raises:
            ValueError: several data-parallel ranks without FSDP2.
        """
        sharded = all(isinstance(parameter, DTensor) for _, parameter in self._walk())
        if dist.is_initialized() and dist.get_world_size() > 1 and not sharded:
            raise ValueError(
                "step_in_backward: DDP averages gradients over the ranks after they would be used; shard the model "
                "with FSDP2 (fully_shard), or use one rank"
            )
        self.steps_in_backward = True
        for _, parameter in self._walk():
            parameter.register_post_accumulate_grad_hook(self._use_up)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _use_up(self, parameter: torch.Tensor) -> None:
        name, gradient = self._names[id(parameter)], parameter.grad
        if id(parameter) in self._squared_norms:
            raise ValueError(
                f"step_in_backward: {name} got a second gradient before step() was called; gradients cannot be "
                "accumulated in this mode: call step() after every backward pass"
            )
        assert gradient is not None
        self._refuse_bad_gradients([parameter], "its parameter was left alone, others may have been updated")
        self._squared_norms[id(parameter)] = sharding.squared_norm(gradient)
        self._update(parameter, self.param_groups[self._group_of[id(parameter)]])
        parameter.grad = None

    def grad_norm(self) -> torch.Tensor:
        """L2 norm, over all ranks, of the gradients that were used up in backward since the last step; 0-dim fp32."""
        return torch.stack(list(self._squared_norms.values())).sum().sqrt()

    def summary(self) -> StateSummary:
        """Return counts and bytes of compressed and of whole moments."""
        compressed = plain_ones = compressed_bytes = plain_bytes = whole_bytes = 0
        for group, parameter in self._walk():
            whole = 4 * len(self.moments) * parameter.numel()
            if is_compressed(self._names[id(parameter)], parameter.shape, group):
                element_bytes = FACTOR_DTYPES[group["factor_dtype"]].itemsize
                compressed += 1
                compressed_bytes += len(self.moments) * group["rank"] * sum(parameter.shape) * element_bytes
                whole_bytes += whole
            else:
                plain_ones += 1
                plain_bytes += whole
        return StateSummary(compressed, plain_ones, compressed_bytes, plain_bytes, whole_bytes)

    def _walk(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter

    def _refuse_bad_gradients(self, parameters: list[torch.Tensor], consequence: str) -> None:
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"{self._names[id(parameter)]}: its gradient is sparse; use nn.Embedding(sparse=False)"
                )
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not (self._check_finite and gradients) or sharding.is_fake(gradients[0]):
            return
        if sharding.is_finite(gradients):
            return
        bad = [self._names[id(p)] for p in parameters if p.grad is not None and not sharding.is_finite([p.grad])]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise NonFiniteError(f"the gradient of {bad[0]}{more} has NaN or infinity; {consequence}")

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        name, state = self._names[id(parameter)], self.state[parameter]
        compressed = is_compressed(name, parameter.shape, group)
        cold = not state
        if cold:
            self._begin(parameter, group)
        state["step"] += 1
        assert parameter.grad is not None
        matrix = Matrix(
            local(parameter),
            local(parameter.grad),
            sharding.sum_over_ranks(parameter),
            self._rounding(name, group["step"], parameter.device),
            sketch_width=len(self.moments) * (group["rank"] + group["oversampling"]) if compressed else 0,
        )
        if compressed:
            self._compressed_step(matrix, [self._momentum(moment, name, state, group) for moment in self.moments],
                                  state["step"], group, cold=cold)  # fmt: skip
        else:
            self._plain_step(matrix, state, group)

    def _begin(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """State before the first step."""
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        if not is_compressed(self._names[id(parameter)], parameter.shape, group):
            state |= {moment: torch.zeros_like(parameter, dtype=torch.float32) for moment in self.moments}
            return
        for moment in self.moments:
            factors = sharding.zero_factors(parameter, group["rank"], FACTOR_DTYPES[group["factor_dtype"]])
            state[f"{moment}.left"], state[f"{moment}.right"] = factors

    def _momentum(self, moment: str, name: str, state: State, group: dict[str, Any]) -> Momentum:
        factors = LowRank(*(local(state[f"{moment}.{side}"]) for side in ("left", "right")))
        fresh = min(group["oversampling"], min(state[f"{moment}.left"].shape[0], factors.shape[1]) - factors.rank)
        return Momentum(factors, fresh, generator(self._seed, "mlorc", name, moment, group["step"]))

    def _rounding(self, name: str, step: int, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], object]:
        if not self._stochastic_rounding:
            return torch.Tensor.copy_
        source = generator(self._seed, "rounding", name, step, device=device)
        return lambda weights, values: weights.copy_(stochastic_round(values, source))

    @abc.abstractmethod
    def _compressed_step(self, matrix: Matrix, moments: list[Momentum], step: torch.Tensor, group: dict[str, Any], *,
                         cold: bool) -> None: ...  # fmt: skip

    @abc.abstractmethod
    def _plain_step(self, matrix: Matrix, state: State, group: dict[str, Any]) -> None: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; every tensor keeps its own dtype.

        (``torch.optim.Optimizer`` would cast the state to the dtype of the parameter.)

        Raises:
            ValueError: state of another version, or of parameters with other shapes or ranks.
        """
        groups, saved = self.param_groups, state_dict["state"]
        flat = list(itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        for group in state_dict["param_groups"]:
            if group.get("version") != STATE_VERSION:
                raise ValueError(
                    f"the state has version {group.get('version')}, this raymem reads {STATE_VERSION}: it was saved by "
                    "another optimizer or another raymem"
                )
        if len(flat) == sum(len(group["params"]) for group in groups):
            options = [g for g in state_dict["param_groups"] for _ in g["params"]]
            for key, group, (_, parameter) in zip(flat, options, self._walk(), strict=True):
                if key in saved:
                    self._check_state(saved[key], parameter, group)
        super().load_state_dict(state_dict)
        for key, (_, parameter) in zip(flat, self._walk(), strict=True):
            for name, value in saved.get(key, {}).items():
                self.state[parameter][name] = value.detach().to(parameter.device, copy=True)

    def _check_state(self, state: State, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        name, shape = self._names[id(parameter)], parameter.shape
        expected: dict[str, tuple[int, ...]]
        if is_compressed(name, shape, group):
            rank = group["rank"]
            sides = {"left": (shape[0], rank), "right": (rank, shape[1])}
            expected = {f"{moment}.{side}": sizes for moment in self.moments for side, sizes in sides.items()}
        else:
            expected = dict.fromkeys(self.moments, tuple(shape))
        shapes = {key: tuple(value.shape) for key, value in state.items() if key != "step"}
        if shapes != expected:
            raise ValueError(f"{name}: the state has {shapes}, a parameter of shape {list(shape)} needs {expected}")


class MLorcAdamW(MLorcOptimizer):
    """AdamW whose moments are held as factors of rank r: ``2 r (m + n)`` numbers for an m x n matrix, not ``2 m n``.

    Args:
        params: parameters, named parameters (their names then seed the sketches and stand in errors), or groups, which
            may have options of their own; ``rank: None`` leaves a group uncompressed.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        rank: rank of the factors; 4 matches full fine-tuning in the paper.
        oversampling: fresh random columns per sketch, beside the directions of the step before.
        min_dim: matrices with a shorter side below it, and all that is no matrix, get plain AdamW.
        second_moment: ``raw`` compresses the second moment (the paper), ``sqrt`` its root.
        factor_dtype: storage of the factors, ``fp32`` or ``bf16``.
        seed: seeds the sketches and the rounding; data-parallel replicas must share it.
        stochastic_rounding: round updated bf16 parameters up or down at random, without bias.
        check_finite: look for NaN in the gradients before anything is written (waits for the device once per step).

    Raises:
        ValueError: an option out of range; the message starts with its name.

    Source: MLorc, algorithm 1. The state of a matrix is ``step``, ``exp_avg.left`` [m, r], ``exp_avg.right`` [r, n] and
    the same for ``exp_avg_sq``; that of all else is AdamW's, in fp32.
    """

    options_class = MLorcAdamWOptions
    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = 4,
        oversampling: int = 8,
        min_dim: int = 64,
        second_moment: Literal["raw", "sqrt"] = "raw",
        factor_dtype: Literal["fp32", "bf16"] = "fp32",
        *,
        seed: int = 0,
        stochastic_rounding: bool = False,
        check_finite: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank,
                    "oversampling": oversampling, "min_dim": min_dim, "second_moment": second_moment,
                    "factor_dtype": factor_dtype}  # fmt: skip
        super().__init__(params, defaults, seed, stochastic_rounding, check_finite)

    def _compressed_step(self, matrix: Matrix, moments: list[Momentum], step: torch.Tensor, group: dict[str, Any], *,
                         cold: bool) -> None:  # fmt: skip
        adamw_step(
            matrix,
            moments[0],
            moments[1],
            step,
            cold=cold,
            root=group["second_moment"] == "sqrt",
            **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")},
        )

    def _plain_step(self, matrix: Matrix, state: State, group: dict[str, Any]) -> None:
        plain.adamw_step(matrix, state, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})


class MLorcLion(MLorcOptimizer):
    """Lion whose momentum is held as factors of rank r: ``r (m + n)`` numbers for an m x n matrix, not ``m n``.

    Arguments, state (``exp_avg``) and errors as in :class:`MLorcAdamW`. Source: MLorc, algorithm 2.
    """

    options_class = MLorcLionOptions
    moments = ("exp_avg",)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        rank: int | None = 4,
        oversampling: int = 8,
        min_dim: int = 64,
        factor_dtype: Literal["fp32", "bf16"] = "fp32",
        *,
        seed: int = 0,
        stochastic_rounding: bool = False,
        check_finite: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "rank": rank, "oversampling": oversampling,
                    "min_dim": min_dim, "factor_dtype": factor_dtype}  # fmt: skip
        super().__init__(params, defaults, seed, stochastic_rounding, check_finite)

    def _compressed_step(self, matrix: Matrix, moments: list[Momentum], step: torch.Tensor, group: dict[str, Any], *,
                         cold: bool) -> None:  # fmt: skip
        lion_step(matrix, moments[0], cold=cold, **{key: group[key] for key in ("lr", "betas", "weight_decay")})

    def _plain_step(self, matrix: Matrix, state: State, group: dict[str, Any]) -> None:
        plain.lion_step(matrix, state, **{key: group[key] for key in ("lr", "betas", "weight_decay")})

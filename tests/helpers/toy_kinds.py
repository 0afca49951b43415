"""Kinds of somebody else: one of every axis, as plain as can be, in a module that other processes can import."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from raymem.kinds import (
    ActivationsKind,
    AdapterKind,
    AttachContext,
    LossKind,
    OptimizerContext,
    OptimizerKind,
    Rule,
    TensorShape,
    TrackerKind,
)
from raymem.tracking import RunStart


@dataclass(frozen=True)
class SignOptions:
    """Sign descent with momentum."""

    kind: Literal["toy_sign"] = "toy_sign"
    lr: float = 1e-3
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: {self.momentum} is outside [0, 1)")


class Sign(torch.optim.Optimizer):
    """Steps by the sign of the momentum."""

    def __init__(self, parameters: Any, lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                parameter.sub_(group["lr"] * state["momentum"].sign())


class SignKind(OptimizerKind[SignOptions]):
    """Without a closed form of its state."""

    options = SignOptions
    space = {"optimizer.momentum": {"type": "float", "low": 0.1, "high": 0.9}}

    def build(self, parameters: Mapping[str, Any], options: SignOptions, context: OptimizerContext) -> Any:
        return Sign(parameters.values(), options.lr, options.momentum)


class KnownSignKind(SignKind):
    """With one."""

    def state_bytes(self, options: SignOptions, tensor: TensorShape) -> int:
        return math.prod(tensor.local) * tensor.itemsize


@dataclass(frozen=True)
class BiasOptions:
    """Only the vectors of the model are trained: norms and biases."""

    kind: Literal["toy_vectors"] = "toy_vectors"


class BiasKind(AdapterKind[BiasOptions]):
    """As BitFit, which needs no layers of its own; the result is a whole model."""

    options = BiasOptions
    trains_base = True

    def attach(self, model: Any, options: BiasOptions, context: AttachContext) -> Any:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
        return model


@dataclass(frozen=True)
class ScaleOptions:
    """Every output of chosen linear layers is scaled by a trained number."""

    kind: Literal["toy_scale"] = "toy_scale"
    layers: str = "q_proj"
    init_from: str | None = None


class Scaled(torch.nn.Module):
    """A frozen linear layer with a trained scale per output."""

    def __init__(self, base: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.scale = torch.nn.Parameter(torch.ones(base.out_features, dtype=dtype, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x) * self.scale
        return result


@dataclass(frozen=True)
class ShiftOptions:
    """Every output of the MLPs gets a trained vector, times a fixed one."""

    kind: Literal["toy_shift"] = "toy_shift"
    init_from: str | None = None


class Shifted(torch.nn.Module):
    """A layer with one tensor of each sort; what its constructor writes is lost on the meta device."""

    def __init__(self, base: Any, size: int, like: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.shift = torch.nn.Parameter(torch.zeros(size, dtype=dtype, device=like.device))
        self.fixed = torch.nn.Parameter(torch.ones(size, dtype=dtype, device=like.device), requires_grad=False)
        self.register_buffer("kept", torch.ones(size, dtype=dtype, device=like.device))
        self.register_buffer("passing", torch.ones(size, dtype=dtype, device=like.device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, passing = self.get_buffer("kept"), self.get_buffer("passing")
        result: torch.Tensor = self.base(x) + self.shift * self.fixed * kept * passing
        return result


class ShiftKind(AdapterKind[ShiftOptions]):
    """An adapter with buffers and a frozen parameter of its own."""

    options = ShiftOptions
    paths = ("init_from",)
    starts: ClassVar[dict[str, float]] = {"shift": 0.0, "fixed": 2.0, "kept": 3.0, "passing": 0.5}

    def attach(self, model: Any, options: ShiftOptions, context: AttachContext) -> Any:
        model.requires_grad_(False)
        for layer in model.model.layers:
            size, like = model.config.hidden_size, next(layer.mlp.parameters())
            layer.mlp = Shifted(layer.mlp, size, like, context.dtype)
        return model

    def initial_value(self, name: str, shape: Sequence[int], seed: int) -> Any:
        return torch.full(tuple(shape), self.starts[name.rpartition(".")[2]])

    def buffers(self, model: Any) -> dict[str, Any]:
        return {name: buffer for name, buffer in model.named_buffers() if name.endswith(".kept")}


class ScaleKind(AdapterKind[ScaleOptions]):
    """An adapter that PEFT knows nothing of."""

    options = ScaleOptions
    paths = ("init_from",)

    def attach(self, model: Any, options: ScaleOptions, context: AttachContext) -> Any:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if name.endswith(f".{options.layers}"):
                model.set_submodule(name, Scaled(module, context.dtype))
        return model

    def initial_value(self, name: str, shape: Any, seed: int) -> torch.Tensor:
        return torch.ones(*shape)

    def rules(self) -> list[Rule]:
        return [
            Rule(
                ("adapter: toy_scale", "base.quantize: nf4"),
                "a toy is not for bits",
                "use adapter: lora",
                lambda r: isinstance(r.adapter, ScaleOptions) and r.base.quantize == "nf4",
            )
        ]


@dataclass(frozen=True)
class HalfOptions:
    """Saved activations are held in bf16."""

    kind: Literal["toy_half"] = "toy_half"


class HalfKind(ActivationsKind[HalfOptions]):
    """Saved tensors of fp32 are rounded."""

    options = HalfOptions

    def install(self, model: Any, options: HalfOptions, seed: int) -> None:
        forward = model.forward

        def pack(tensor: torch.Tensor) -> Any:
            own = isinstance(tensor, torch.nn.Parameter) or tensor.dtype != torch.float32
            return tensor if own else (tensor.bfloat16(), tensor.dtype)

        def unpack(packed: Any) -> torch.Tensor:
            return packed[0].to(packed[1]) if isinstance(packed, tuple) else packed

        def halved(*args: Any, **inputs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return forward(*args, **inputs)

        model.forward = halved


@dataclass(frozen=True)
class SmoothOptions:
    """Cross-entropy with label smoothing."""

    kind: Literal["toy_smooth"] = "toy_smooth"
    smoothing: float = 0.1


class SmoothKind(LossKind[SmoothOptions]):
    """torch's."""

    options = SmoothOptions

    def loss_sum(self, logits_NV: torch.Tensor, ids_N: torch.Tensor, options: SmoothOptions) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits_NV, ids_N, ignore_index=-100, reduction="sum", label_smoothing=options.smoothing
        )


@dataclass(frozen=True)
class LinesOptions:
    """Rows are appended to a file of JSON lines."""

    kind: Literal["toy_lines"] = "toy_lines"
    file: str = "tracked.jsonl"


@dataclass(frozen=True)
class LinesResult:
    """Says where they are."""

    run_id: str | None
    problem: str | None = None
    hint: str | None = None

    def summary_lines(self) -> list[str]:
        return [f"tracked in {self.run_id}"]


class LinesTracker:
    """One line per row, and one for the end."""

    def __init__(self, file: str) -> None:
        self.run_id: str | None = file

    @classmethod
    def start(cls, start: RunStart) -> LinesTracker:
        return cls(start.recipe["tracking"]["file"])

    @classmethod
    def check(cls, options: Mapping[str, Any], storage_path: str) -> str:
        return f"{options['file']} can be written"

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with Path(str(self.run_id)).open("a") as file:
            file.writelines(json.dumps(dict(row)) + "\n" for row in rows)

    def finish(
        self, status: str, artifacts: Mapping[str, str | Path] | None = None, *, model: str | None = None
    ) -> LinesResult:
        self.log([{"status": status, "artifacts": sorted(artifacts or {})}])
        return LinesResult(self.run_id)


class LinesKind(TrackerKind[LinesOptions]):
    """A tracker of a few lines."""

    options = LinesOptions
    paths = ("file",)

    def load(self) -> type[Any]:
        return LinesTracker

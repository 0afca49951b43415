"""Other methods as their own users run them: transformers, PEFT and the optimizer's package, in a plain loop.

Optimizers come from galore-torch, apollo-torch and torchao; what is not installed is left out, with a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

RANK, ALPHA, LR = 16, 32, 1e-4


@dataclass
class Peer:
    """A model with its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, ids: torch.Tensor) -> float:
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def state(self) -> Iterable[torch.Tensor]:
        """Return the tensors of the optimizer's state, projections included."""
        for values in self.optimizer.state.values():
            for value in [*values.values(), *vars(values.get("projector", object)).values()]:
                if isinstance(value, torch.Tensor):
                    yield value


def adapted(make: Callable[[], Any]) -> Callable[[Any], Peer]:
    """Return what attaches an adapter of PEFT and trains it by AdamW."""

    def build(model: Any) -> Peer:
        from peft import get_peft_model

        wrapped: Any = get_peft_model(model, make())
        return Peer(wrapped, torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], LR))

    return build


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0, **options
    )


def velora() -> Any:
    from peft import VeloraConfig

    return lora(velora_config=VeloraConfig())


def shira() -> Any:
    from peft import ShiraConfig

    return ShiraConfig(r=RANK, target_modules=LINEAR, random_seed=0, task_type="CAUSAL_LM")


def supertuning() -> Any:
    from peft import SupertuningConfig

    return SupertuningConfig(target_modules=LINEAR, task_type="CAUSAL_LM")


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def checkpointed(model: Any) -> Peer:
    peer = adapted(lora)(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return peer


def lora_fa(model: Any) -> Peer:
    from peft import get_peft_model
    from peft.optimizers import create_lorafa_optimizer

    wrapped: Any = get_peft_model(model, lora())
    return Peer(wrapped, create_lorafa_optimizer(wrapped, r=RANK, lora_alpha=ALPHA, lr=LR))


def full(optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> Callable[[Any], Peer]:
    return lambda model: Peer(model, optimizer(model))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), LR)


def adamw_8bit(model: nn.Module) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), LR)  # type: ignore[no-any-return]


def _projected(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Groups of an optimizer that projects the gradients of linear layers."""
    matrices = [m.weight for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in LINEAR]
    chosen = {id(weight) for weight in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [{"params": rest}, {"params": matrices, **options}]


def galore(model: nn.Module) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    options = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW(_projected(model, **options), lr=LR, no_deprecation_warning=True)  # type: ignore[no-any-return]


def apollo(model: nn.Module) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    options = {"rank": 128, "proj": "random", "scale_type": "channel", "scale": 1.0, "update_proj_gap": 200,
               "proj_type": "std"}  # fmt: skip
    return APOLLOAdamW(_projected(model, **options), lr=LR)  # type: ignore[no-any-return]


PEERS: dict[str, Callable[[Any], Peer]] = {
    "PEFT LoRA": adapted(lora),
    "PEFT LoRA, checkpointing": checkpointed,
    "LoRA-FA": lora_fa,
    "VeLoRA": adapted(velora),
    "SHiRA": adapted(shira),
    "Supertuning": adapted(supertuning),
    "AdamW": full(adamw),
    "8-bit AdamW": full(adamw_8bit),
    "GaLore": full(galore),
    "APOLLO": full(apollo),
}

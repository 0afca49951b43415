"""Cases that the tests of MoRAM share: random layers, a straight-line reference, and small models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raymem.methods.moram import MoRAMConfig, select_indices


@dataclass
class Case:
    """One layer and one batch; ``mask_OI`` is the dense mask that MoRAM never makes."""

    x: torch.Tensor
    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None
    index_OK: torch.Tensor
    factor_A_RI: torch.Tensor
    factor_B_OR: torch.Tensor
    grad_y: torch.Tensor
    scale: float = 0.75

    @property
    def mask_OI(self) -> torch.Tensor:
        return torch.zeros_like(self.weight_OI).scatter_(1, self.index_OK.long(), 1.0)


def random_case(
    outputs: int, inputs: int, k: int, *, rank: int = 3, tokens: tuple[int, ...] = (2, 7), bias: bool = True,
    dtype: torch.dtype = torch.float32, factor_dtype: torch.dtype | None = None, seed: int = 0,
) -> Case:  # fmt: skip
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int, to: torch.dtype = dtype, grad: bool = False) -> torch.Tensor:
        value = torch.randn(*shape, generator=source, dtype=torch.float64).to(to)
        return value.requires_grad_(grad)

    index_OK = torch.rand(outputs, inputs, generator=source).topk(k, dim=1).indices.sort(dim=1).values.int()
    return Case(
        draw(*tokens, inputs, grad=True),
        draw(outputs, inputs),
        draw(outputs, grad=True) if bias else None,
        index_OK,
        draw(rank, inputs, to=factor_dtype or dtype, grad=True),
        draw(outputs, rank, to=factor_dtype or dtype, grad=True),
        draw(*tokens, outputs),
    )


def dense_reference(case: Case) -> list[torch.Tensor]:
    """Output, then gradients of x, A, B and the bias, by autograd through a dense mask, in fp64."""
    double = {name: value.detach().double() for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
    x, A, B = (double[name].requires_grad_() for name in ("x", "factor_A_RI", "factor_B_OR"))
    bias = double["bias_O"].requires_grad_() if case.bias_O is not None else None
    y = F.linear(x, double["weight_OI"] + case.mask_OI.double() * (B @ A) * case.scale, bias)
    y.backward(double["grad_y"])
    return [value for value in (y, x.grad, A.grad, B.grad, None if bias is None else bias.grad) if value is not None]


def small_llama(seed: int = 0, **changes: Any) -> Any:
    """An untrained Llama of two layers, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**{**shape, "num_attention_heads": 4, "max_position_embeddings": 64, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def small_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=128,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )


def token_batches(count: int, seed: int = 0, rows: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Keyword dicts for a language model's forward."""
    source = torch.Generator().manual_seed(seed)
    draws = [torch.randint(128, (rows, length), generator=source) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in draws]


def with_moram(model: nn.Module, **options: Any) -> Any:
    """The model with an adapter, not selected yet."""
    from peft import get_peft_model

    size = {} if "k" in options else {"density": 0.25}
    return get_peft_model(
        model, MoRAMConfig(**{"r": 4, "alpha": 8.0, "target_modules": "all-linear", **size, **options})
    )


def randomised(model: Any, seed: int = 0) -> Any:
    """The same model with every factor B away from zero."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if ".moram_B." in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(seed * 1000 + number))
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


BATCH = token_batches(1, seed=9)[0]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=BATCH["input_ids"]).logits
    return found


def ready(base: Any | None = None, **options: Any) -> Any:
    """A selected adapter whose update is not zero."""
    model = with_moram(base or small_llama(), **options)
    select_indices(model, token_batches(2))
    return randomised(model)

"""Answers about an architecture are the same whoever asks first: they are kept for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raymem.methods.probe import asked_once


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_while_it_answers(where: Any, llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Evaluation and generation load models too, and ask without gradients."""
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path))
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama))

    def ask() -> dict[str, Any]:
        weight = torch.ones(2, requires_grad=True)
        weight.sum().backward()
        return {"gradient": weight.grad is not None}

    with where():
        assert asked_once(f"under {where.__name__}", model, (), ask) == {"gradient": True}

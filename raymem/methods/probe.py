"""Answers questions about an architecture by a small clone of it, once per class, options and versions.

Whether its loss can be taken in chunks, whether packed examples stay apart, which linear layers a text passes through:
each is tried on a random clone (:mod:`raymem.methods.tiny_model`) instead of being looked up in a list of names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from raymem.cache import remembered, source_digest, versions
from raymem.methods import tiny_model


def asked_once(
    question: str, model: Any, sources: tuple[Path, ...], ask: Callable[[], dict[str, Any]], *, detail: Any = None
) -> dict[str, Any]:
    """Return the answer for the architecture of a causal language model of transformers.

    Args:
        question: its name, which tells answers apart.
        model: bare, on any device; its sizes count only where a clone has them.
        sources: files and folders of the code that answers.
        ask: does so, in plain values, and raises nothing. Gradients are on meanwhile, whoever asks.
        detail: what else the answer depends on.
    """

    def answer() -> dict[str, Any]:
        with torch.inference_mode(False), torch.enable_grad():
            return ask()

    try:
        clone = tiny_model.tiny_config(model.config, all_layers=True).to_json_string(use_diff=False)
    except Exception:  # configs raise types of their own; the probe itself says what is wrong
        return answer()
    code = source_digest(*sources, Path(tiny_model.__file__), Path(__file__))
    facts = [question, class_of(model).__qualname__, clone, detail, code, versions("torch", "transformers", "peft")]
    return remembered("probes", facts, answer)


def class_of(model: Any) -> Any:
    """Return the class of a model as transformers has it; FSDP2 makes one of its own from that."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def why_not(error: Exception) -> str:
    """Say in words why a clone gives no answer."""
    return f"a small clone of it cannot be run ({type(error).__name__}: {first_line(error)})"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, in at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]

"""Which way the chunked loss takes for a model, if any: what the probe says of its architecture, and its head here."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raymem.cache import cache_root, read_json, write_json
from raymem.methods import tiny_model
from raymem.methods.chunked_loss.causal_lm import is_plain_product
from raymem.methods.chunked_loss.probing import Verdict, probe


@dataclass(frozen=True)
class Choice:
    """How the loss of a model is to be computed."""

    chunked: bool
    """False where no way of taking it in chunks is right."""
    replay: bool
    """Through the model's own head (:func:`raymem.methods.chunked_loss.chunked_loss_sum`)."""
    reason: str | None
    """Why it cannot be chunked."""


def choose(model: Any) -> Choice:
    """Choose for a causal language model of transformers: the bare one, with whatever an adapter made of its head."""
    verdict = verdict_of(model.config)
    if verdict.product and is_plain_product(model.get_output_embeddings()):
        return Choice(chunked=True, replay=False, reason=None)
    if verdict.replay:
        return Choice(chunked=True, replay=True, reason=None)
    return Choice(chunked=False, replay=False, reason=verdict.reason)


def verdict_of(config: Any) -> Verdict:
    """The verdict of :func:`probe` on an architecture; asked once per class, options and versions on this machine."""
    try:
        clone = tiny_model.tiny_config(config).to_json_string(use_diff=False)
    except Exception:  # configs raise types of their own; the probe says what is wrong
        return probe(config)
    key = hashlib.sha256(f"{type(config).__qualname__} {clone} {_code()}".encode()).hexdigest()[:32]
    if key not in _verdicts:
        file = cache_root() / "probes" / f"{key}.json"
        stored = read_json(file)
        if stored is None:
            stored = vars(probe(config))
            write_json(file, stored)
        _verdicts[key] = Verdict(**stored)
    return _verdicts[key]


_verdicts: dict[str, Verdict] = {}


@functools.cache
def _code() -> str:
    """Versions of everything that a verdict depends on."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(tiny_model.__file__)]
    ours = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return json.dumps([ours, *(version(name) for name in ("torch", "transformers"))])

"""Tries on a small clone whether a model keeps packed examples apart, packed as in the training step.

Position ids restart with every example, and transformers makes a block mask of them, where an architecture heeds them.
A state that is carried from token to token, or attention that looks at no position ids, would let one example into the
next. What is asked is that the second example of a row gets the logits that it gets in a row of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raymem.errors import RecipeError
from raymem.methods.probe import asked_once, class_of, first_line, why_not
from raymem.methods.tiny_model import VOCABULARY, random_clone
from raymem.recipe.schema import Recipe
from raymem.seeds import generator

_ROWS, _FIRST, _LENGTH = 2, 14, 24
"""Rows, and where the second example of a row begins and ends."""
_TOLERANCE = 1e-3
"""Tolerance as a share of the logits' standard deviation. In fp32 rounding gives 1e-6, a leak 0.1 and more."""
_ON_CPU = ("eager", "sdpa")
"""Attention implementations that a clone on the CPU can have. The architecture's own choice stands in for others, since
all of them tell packed examples apart by the same position ids."""


def refuse_leaks(model: Any, recipe: Recipe) -> None:
    """Refuse packing whose examples would see each other.

    Args:
        model: bare transformers model, on any device.

    Raises:
        RecipeError: ``data.packing: bfd`` for an architecture that does not keep examples apart.
    """
    if recipe.data.packing != "bfd":
        return
    reason = why_not_apart(model)
    if reason is not None:
        raise RecipeError(
            f"data.packing: bfd does not keep the examples of a row apart in {type(model).__name__}: {reason}; use "
            "data.packing: none"
        )


def why_not_apart(model: Any) -> str | None:
    """Say why a model with its attention does not keep packed examples apart; None if it does."""
    attention = getattr(model.config, "_attn_implementation", None)
    attention = attention if attention in _ON_CPU else None
    sources = (Path(__file__),)
    answer = asked_once("packing", model, sources, lambda: {"reason": _ask(model, attention)}, detail=attention)
    return None if answer["reason"] is None else str(answer["reason"])


@torch.no_grad()
def _ask(real: Any, attention: str | None) -> str | None:
    try:
        model = random_clone(real.config, kind=class_of(real), all_layers=True, attention=attention)
    except Exception as error:  # model code may raise anything
        return why_not(error)
    source = generator(0, "packing", "probe")
    ids = torch.randint(3, VOCABULARY, (_ROWS, _LENGTH), generator=source)
    others = torch.cat([torch.randint(3, VOCABULARY, (_ROWS, _FIRST), generator=source), ids[:, _FIRST:]], dim=1)
    positions = torch.cat([torch.arange(_FIRST), torch.arange(_LENGTH - _FIRST)]).expand(_ROWS, -1)

    def logits(row: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        all_logits: torch.Tensor = model(input_ids=row, position_ids=positions, use_cache=False).logits
        return all_logits[:, -(_LENGTH - _FIRST) :]

    try:
        packed, changed = logits(ids, positions), logits(others, positions)
        alone = logits(ids[:, _FIRST:], positions[:, _FIRST:])
    except Exception as error:  # as above
        return f"it takes no position ids ({type(error).__name__}: {first_line(error)})"
    if _differ(packed, changed):
        return "when the first of two examples in a row changes, the logits of the second move"
    if _differ(packed, alone):
        return "an example behind another one gets other logits than in a row of its own"
    return None


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not float((one - other).abs().max()) <= _TOLERANCE * float(one.std())

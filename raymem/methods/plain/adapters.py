"""Trains all parameters: no adapter, perhaps with some modules frozen."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from raymem.errors import RecipeError
from raymem.kinds import OPTIONS_RULES, AdapterKind, AttachContext, Start


@dataclass(frozen=True)
class NoAdapter:
    """Full-parameter training."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["none"] = "none"
    freeze: list[str] = field(default_factory=list)
    """Modules whose weights stay as they are, for example ``[lm_head]``; what is tied to them stays too."""


class FullTrainingKind(AdapterKind[NoAdapter]):
    """The kind that trains everything but the modules that ``freeze`` names."""

    options = NoAdapter
    trains_base = True
    usage = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")"""
    start = Start(
        "full",
        "full fine-tuning",
        {
            "adapter.kind": ("none", "every weight is trained"),
            "optimizer.kind": ("adamw", ""),
            "optimizer.lr": (1.0e-5, "usual for full fine-tuning: 1.0e-5 to 2.0e-5"),
        },
    )

    def attach(self, model: Any, options: NoAdapter, context: AttachContext) -> Any:
        from raymem.methods.peft.linear_layers import freeze_unused

        freeze(model, options.freeze)
        freeze_unused(model)
        return model


def freeze(model: Any, names: Sequence[str]) -> None:
    """Take the weights of modules out of training.

    Args:
        names: whole names of modules, or their ends after a dot.

    Raises:
        RecipeError: the model has no such module.
    """
    modules = dict(model.named_modules())
    for name in names:
        paths = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not paths:
            near = difflib.get_close_matches(name, sorted({path.rpartition(".")[2] for path in modules}), n=3)
            raise RecipeError(
                f"adapter.freeze: {name!r} is no module of {type(model).__name__}"
                f"{'; near names: ' + ', '.join(near) if near else ''}"
            )
        for path in paths:
            modules[path].requires_grad_(False)

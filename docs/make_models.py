"""Write docs/models.md from what probes say of tiny models of many architectures: ``python docs/make_models.py``.

A test asserts that some rows of the committed page are what this prints, and that none is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the list of architectures is that of the tests

from tests.helpers.families import FAMILIES, config_of, options_of  # noqa: E402

PAGE = Path(__file__).with_name("models.md")
HEAD = """# Models

Made by `python docs/make_models.py` with transformers {transformers}, peft {peft} and torch {torch}; do not edit by
hand.

raymem trains every causal language model of transformers, also those that see images, on text. What an architecture
supports is asked of a small random clone of it, once per machine, and kept in raymem's cache; so what is not in this
table is known all the same. `raymem train` and `raymem plan` say in a few lines what of a model is adapted, quantised
and left alone, and why.

- **packing**: `bfd` where a clone shows that the second of two examples in a row gets the logits that it gets in a
  row of its own; otherwise `data.packing: bfd`, which is the default, is refused, and `none` (or `wrapped`, which
  runs examples into one stream by definition) is to be set. A GPU's FlashAttention is judged by the same clone on the
  CPU.
- **loss**: how `loss: auto` takes it. `product`: in chunks, from the head's input and weight. `replay`: in chunks,
  through the model's own head. `full`: whole.
- **all-linear leaves out**: `adapter.targets: all-linear` is every linear layer that text passes through and that
  multiplies by its weight and no more, except the output head. Left out are layers that text does not reach (vision),
  routers that give more than a tensor, layers whose weight the code around them hands to a kernel, where an adapter
  would do nothing, and layers whose names PEFT takes for those of routed experts, so that it would adapt these
  instead.
- **experts**: routed experts are parameters with three dimensions, no linear layers. They are left alone in every
  architecture, because PEFT reaches them under rules that differ between architectures and holds a whole copy of them
  for backward. `adapter.targets: [q_proj, experts.down_proj, experts.gate_up_proj]` adapts them (LoRA without
  dropout); where they are in 4 bits, without that copy.
- **NF4**: `base.quantize: nf4` stores linear layers in 4 bits, except the output head, and routed experts, each as a
  linear layer of its own would be. Experts whose weights lie in a way that is not known are refused.
- **LoRAM**: whether `base.kind: loram` can prune it.

With full fine-tuning (`adapter: none`) parameters that text does not pass through stay as they are.

| architecture | class | packing | loss | all-linear leaves out | experts | NF4 | LoRAM |
|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    from importlib.metadata import version

    versions = {name: version(name).split("+")[0] for name in ("transformers", "peft", "torch")}
    return HEAD.format(**versions) + "\n".join(row(name) for name in FAMILIES) + "\n"


def row(name: str) -> str:
    """One line of the table."""
    from transformers import AutoModelForCausalLM

    from raymem.methods.chunked_loss.choice import verdict_of
    from raymem.methods.peft.linear_layers import linear_layers, pattern_of, routed_experts, text_pass
    from raymem.training.model.packing import why_not_apart

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    verdict = verdict_of(model)
    way = "product" if verdict.product else "replay" if verdict.replay else "full"
    passed = text_pass(model)
    reasons: dict[str, dict[str, None]] = {}
    for layer in linear_layers(model):
        reason = passed.why_left_alone(layer)
        if reason is not None:
            reasons.setdefault(reason, {})[".".join(pattern_of(layer).split(".")[-2:])] = None
    left_out = "; ".join(f"`{'`, `'.join(layers)}`: {reason}" for reason, layers in reasons.items())
    experts = bool(routed_experts(model))
    cells = [
        f"`{options_of(name)['model_type']}`" + (f" ({name.partition('_')[2]})" if name not in _model_types() else ""),
        type(model).__name__,
        "`none`" if why_not_apart(model) else "`bfd`",
        way,
        left_out,
        "left alone" if experts else "",
        "yes" if _can_be_quantised(model) else "refused",
        "yes" if _can_be_pruned(name) else "",
    ]
    return f"| {' | '.join(cells)} |"


def _model_types() -> set[str]:
    return {options_of(name)["model_type"] for name in FAMILIES}


def _can_be_quantised(model: Any) -> bool:
    from raymem.errors import RaymemError
    from raymem.training.model import experts

    try:
        experts.check(model)
    except RaymemError:
        return False
    return True


def _can_be_pruned(name: str) -> bool:
    from raymem.errors import RaymemError
    from raymem.methods.loram.validate import validate_coupling

    try:
        validate_coupling(config_of(name))
    except RaymemError:
        return False
    return True


if __name__ == "__main__":
    PAGE.write_text(page())

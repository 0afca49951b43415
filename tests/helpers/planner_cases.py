"""Recipes of small models whose peaks are predicted and measured."""

from __future__ import annotations

from typing import Any

from raymem.recipe.schema import Recipe
from tests.helpers.support import FAMILIES, make_recipe

LENGTH = 256
BF16: dict[str, Any] = {"train": {"precision": "bf16"}}
FULL: dict[str, Any] = {"adapter": "none"}
CHECKPOINT: dict[str, Any] = {"activations": "checkpoint"}
MORAM: dict[str, Any] = {"adapter": {"kind": "moram", "rank": 4, "density": 0.1, "criterion": "random"}}

FRAGMENTS: dict[str, list[dict[str, Any]]] = {
    "lora": [],
    "lora checkpoint": [CHECKPOINT],
    "lora bf16": [BF16],
    "lora bf16 checkpoint": [BF16, CHECKPOINT],
    "lora bf16_mixed": [{"train": {"precision": "bf16_mixed"}, "model": {"dtype": "bf16"}}],
    "lora padded": [{"data": {"packing": "none"}}],
    "lora one stream": [{"data": {"packing": "wrapped"}}],
    "lora accumulation": [{"train": {"global_batch": 6, "micro_batch": 2}}],
    "full": [FULL],
    "full bf16 masters": [FULL, BF16],
    "full bf16 stochastic rounding": [FULL, BF16, {"train": {"master": "stochastic_rounding"}}],
    "full bf16_mixed": [FULL, {"train": {"precision": "bf16_mixed"}}],
    "full foreach": [FULL, {"optimizer": {"implementation": "foreach"}}],
    "moram fast": [MORAM, {"adapter": {"formulation": "fast"}}],
    "moram frugal bf16": [MORAM, BF16, {"adapter": {"formulation": "frugal"}}],
    "moram checkpoint": [MORAM, CHECKPOINT],
    "loract layer": [{"activations": {"kind": "loract"}}],
    "loract sublayer bf16": [BF16, {"activations": {"kind": "loract", "scope": "sublayer"}}],
    "loract linear full": [FULL, {"activations": {"kind": "loract", "scope": "linear"}}],
    "moram loract": [MORAM, {"activations": {"kind": "loract"}}],
    "mlorc adamw": [FULL, {"optimizer": {"kind": "mlorc_adamw"}}],
    "mlorc lion bf16 checkpoint": [FULL, BF16, CHECKPOINT, {"optimizer": {"kind": "mlorc_lion"}}],
    "lora streamed": [{"base": {"offload": True}}],
    "lora streamed offload checkpoint": [
        {"base": {"offload": True}, "activations": {"kind": "offload", "checkpoint": True}}
    ],
    "lora offload": [{"activations": "offload"}],
    "full bf16 offload checkpoint": [FULL, BF16, {"activations": {"kind": "offload", "checkpoint": True}}],
    "full 8-bit": [FULL, {"optimizer": "adamw_8bit"}],
    "full 8-bit bf16 masters": [FULL, BF16, {"optimizer": "adamw_8bit"}],
    "mlorc in backward": [
        FULL,
        {
            "optimizer": {"kind": "mlorc_adamw", "step_in_backward": True},
            "train": {"clip_norm": None, "global_batch": 2},
        },
    ],
}


def model_config(family: str, layers: int) -> dict[str, Any]:
    """A model that is small but whose tensors are larger than what any library keeps beside them."""
    if family == "gpt2":
        return {**FAMILIES[family], "n_embd": 128, "n_layer": layers, "n_positions": 256, "vocab_size": 512}
    wide = {"hidden_size": 128, "intermediate_size": 344, "max_position_embeddings": 256, "vocab_size": 512}
    config = {**FAMILIES[family], **wide, "num_hidden_layers": layers}
    return {**config, "head_dim": 32} if "head_dim" in config else config


def case(name: str, family: str = "llama", layers: int = 2) -> Recipe:
    model = {"name": None, "config": model_config(family, layers), "tokenizer": "demo"}
    return make_recipe({"model": model, "data": {"sequence_length": LENGTH}}, *FRAGMENTS[name])

"""Plans of 4-bit models need no bitsandbytes, and are those that its own layers give, byte for byte."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raymem.memory import nf4
from raymem.planner.subprocess_main import answer
from raymem.planner.tracing.step_trace import planned_model
from raymem.recipe.schema import Recipe
from raymem.training.model import quantised
from tests.helpers.support import make_recipe, save_model

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 256, "head_dim": 32}
MORAM = {"adapter": {"kind": "moram", "rank": 4, "density": 0.1, "criterion": "gradient"}}
CHECKPOINT = {"activations": "checkpoint", "data": {"eval": "eval.jsonl"}}
MIXED = {"train": {"precision": "bf16_mixed"}, "model": {"dtype": "bf16"}}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with plain linear layers, and with GPT-2's, which have biases."""
    folder = tmp_path_factory.mktemp("models")
    return {"llama": save_model(folder / "llama", **WIDE), "gpt2": save_model(folder / "gpt2", "gpt2")}


def recipe_of(model: Path, *fragments: dict[str, Any]) -> Recipe:
    four_bits = {"base": {"quantize": "nf4"}, "train": {"precision": "bf16"}, "data": {"sequence_length": 64}}
    return make_recipe(four_bits, {"scaling": {"use_gpu": True}}, *fragments, model=model)


def plan_of(recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = answer({"recipe": recipe.to_dict(), "gpu": "L4", "rows": None, "problem": None})["plan"]
    assert found["traced"], found["note"]
    return {**found, "seconds": None}


def quantised_by_bitsandbytes(weight: torch.Tensor) -> nn.Parameter:
    """Its own description around the same tensors, which is what its own layers and functions read."""
    import bitsandbytes.functional as bnb

    packed: Any = own(weight)
    state = packed.quant_state
    nested = bnb.QuantState(
        absmax=state.state2.absmax, blocksize=state.state2.blocksize, code=state.state2.code, dtype=torch.float32
    )
    packed.quant_state = bnb.QuantState(
        absmax=state.absmax, shape=state.shape, dtype=state.dtype, blocksize=state.blocksize, code=state.code,
        quant_type="nf4", offset=state.offset, state2=nested,
    )  # fmt: skip
    return packed


own = nf4.quantised


@pytest.mark.parametrize(
    ("family", "fragment"),
    [("llama", CHECKPOINT), ("llama", MORAM), ("gpt2", MIXED), ("gpt2", MORAM)],
    ids=["llama checkpoint", "llama moram", "gpt2 mixed", "gpt2 moram"],
)
def test_a_plan_is_that_of_bitsandbytes_own_layers(
    family: str, fragment: dict[str, Any], directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaks, phases, timeline, and who holds what by which operation."""
    pytest.importorskip("bitsandbytes")
    recipe = recipe_of(directories[family], fragment)
    plan = plan_of(recipe)
    place = quantised.place
    monkeypatch.setattr(
        quantised, "place", lambda *model, planned, sharded: place(*model, planned=False, sharded=sharded)
    )
    monkeypatch.setattr(nf4, "quantised", quantised_by_bitsandbytes)
    assert any(type(module).__module__.startswith("bitsandbytes") for module in planned_model(recipe).modules())
    assert plan_of(recipe) == plan


def test_a_plan_needs_no_bitsandbytes(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = recipe_of(directories["llama"], CHECKPOINT)
    whole = plan_of(make_recipe(recipe.to_dict(), {"base": {"quantize": "none"}}))
    assert plan_of(recipe)["state"]["weights"] < whole["state"]["weights"] / 2
    assert plan_of(recipe_of(directories["llama"], MORAM))["phases"]["before_step"]


def test_stand_ins_cannot_compute() -> None:
    with pytest.raises(NotImplementedError, match="raymem::dequantize_blockwise"):
        torch.ops.raymem.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8), torch.float32)


def test_two_workers_share_codes_and_scales(directories: dict[str, Path]) -> None:
    """Of the base; the rest of a worker is planned and counted as for any sharded model."""
    states = {}
    for strategy in ("ddp", "fsdp2"):
        recipe = recipe_of(directories["llama"], {"scaling": {"num_workers": 2, "strategy": strategy}})
        states[strategy] = plan_of(recipe)["state"]
    assert states["fsdp2"]["weights"] == pytest.approx(states["ddp"]["weights"] / 2, rel=0.01)

"""FSDP2 shards 4-bit bases, codes and scales, and every worker computes what one with the whole base does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raymem.memory.meter import resident_tensors, storage_bytes
from raymem.planner.plan import make_plan
from raymem.planner.tracing.step_trace import trace_step
from raymem.planner.types import Target
from raymem.recipe.schema import Recipe
from raymem.testing import measure_step
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import build_model
from tests.helpers import families
from tests.helpers.support import (
    assert_same,
    column,
    in_processes,
    make_recipe,
    run_fragment,
    save_model,
    save_tokenizer,
    train,
)

pytestmark = pytest.mark.slow
pytest.importorskip("bitsandbytes")

WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 192},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 6},
}
ON_EXPERTS: dict[str, Any] = {"adapter": {"targets": ["q_proj", "experts.gate_up_proj", "experts.down_proj"]}}
MORAM: dict[str, Any] = {"adapter": {"kind": "moram", "rank": 4, "density": 0.1, "criterion": "magnitude"}}
OTHERS = ("norm", "embed", "lm_head", "rotary", "moram_", ".gate.weight")
"""Parts of the names of frozen tensors that are not in 4 bits."""
STEPS = 20
STOP = 13
"""Runs that are cut off here have the checkpoint of step 10."""


def recipe_of(name: str, strategy: str, workers: int, *fragments: dict[str, Any], model: Path) -> dict[str, Any]:
    """A run of 20 steps with a 4-bit base."""
    return make_recipe(
        {"name": name, "base": {"quantize": "nf4"}, "train": {"precision": "bf16", "steps": STEPS, "save_every": 10}},
        {"optimizer": {"lr": 1e-3}, "scaling": {"num_workers": workers, "strategy": strategy}},
        *fragments,
        model=model,
    ).to_dict()


def run_all(jobs: list[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
    """Train every recipe, up to a step if one is given; the losses and the outcome of each."""
    found = []
    for raw, stop_after in jobs:
        outcome, rows = train(Recipe.model_validate(raw), stop_after=stop_after)
        found.append({"losses": column(rows), "outcome": outcome and outcome.to_dict()})
    return found


def frozen_bytes(raw: dict[str, Any]) -> tuple[int, int]:
    """Bytes of this rank's frozen weights with their scales, and of those that are in 4 bits."""
    recipe = Recipe.model_validate(raw)
    model = build_model(recipe, DistEnv.current(recipe))
    held = [tensor for tensor in resident_tensors(model) if not tensor.requires_grad]
    named = [*model.named_parameters(), *model.named_buffers()]
    others = [t for name, t in named if any(part in name for part in OTHERS) and not t.requires_grad]
    return storage_bytes(held), storage_bytes(held) - storage_bytes(others)


def weigh_and_measure(raws: list[dict[str, Any]]) -> list[tuple[int, tuple[int, int]]]:
    return [(measure_step(Recipe.model_validate(raw)).allocated_bytes, frozen_bytes(raw)) for raw in raws]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of an architecture -> a model."""
    place = tmp_path_factory.mktemp("bases")
    found = {"llama": save_model(place / "llama", **WIDE)}
    for family, sizes in EXPERTS.items():
        found[family] = families.save(place / family, family, **{**WIDE, **sizes})
        save_tokenizer(found[family])
    return found


@pytest.fixture(scope="module")
def found(
    bases: dict[str, Path], examples: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Name of a run -> its losses (of resumed runs also those of their first part) and its outcome, of rank 0."""
    place = tmp_path_factory.mktemp("runs")
    where = run_fragment(examples, place)

    def job(key: str, name: str, strategy: str, *fragments: dict[str, Any], stop: int = 0, base: str = "llama") -> Any:
        return key, (recipe_of(name, strategy, 2, where, *fragments, model=bases[base]), stop)

    def both(kind: str, *fragments: dict[str, Any], base: str = "llama") -> list[Any]:
        return [
            job(f"{s}{kind}", f"{s}{kind}".replace(" ", "-").replace("'", ""), s, *fragments, base=base)
            for s in ("ddp", "fsdp2")
        ]

    jobs = dict([
        *both(""),
        *both(" moram", MORAM),
        *both(" mixtral", base="mixtral"),
        *both(" qwen3_moe", base="qwen3_moe"),
        *both(" mixtral's experts", ON_EXPERTS, base="mixtral"),
        job("stopped", "resumed", "fsdp2", stop=STOP),
        job("resumed", "resumed", "fsdp2"),
        job("ddp stopped", "switched", "ddp", stop=STOP),
        job("switched", "switched", "fsdp2"),
    ])  # fmt: skip
    first, second = in_processes(run_all, 2, place / "group", list(jobs.values()))
    assert [run["losses"] for run in first] == [run["losses"] for run in second]
    return dict(zip(jobs, first, strict=True))


@pytest.mark.parametrize("kind", ["", " moram", " mixtral", " qwen3_moe", " mixtral's experts"])
def test_losses_are_those_of_whole_bases(found: dict[str, Any], kind: str) -> None:
    sharded, whole = found[f"fsdp2{kind}"]["losses"], found[f"ddp{kind}"]["losses"]
    assert len(sharded) == STEPS
    assert sharded == pytest.approx(whole, abs=1e-3)
    assert whole[0] - whole[-1] > 0.03, "otherwise nothing was learned"


def test_a_run_goes_on_bit_for_bit(found: dict[str, Any]) -> None:
    assert found["stopped"]["outcome"] is None
    assert found["resumed"]["outcome"]["started_at"] == 10
    assert found["resumed"]["losses"] == found["fsdp2"]["losses"]
    files = [
        load_file(Path(found[key]["outcome"]["artifact"]) / "adapter_model.safetensors") for key in ("resumed", "fsdp2")
    ]
    assert_same(*files)


def test_what_ddp_saved_goes_on_sharded(found: dict[str, Any]) -> None:
    assert found["switched"]["outcome"]["started_at"] == 10
    assert found["switched"]["losses"] == pytest.approx(found["ddp"]["losses"], abs=1e-3)


def test_the_adapter_is_a_standard_one(found: dict[str, Any], bases: dict[str, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(24)[None]
    logits = []
    for key in ("ddp", "fsdp2"):
        model = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
        plain = model(ids).logits.detach()
        logits.append(PeftModel.from_pretrained(model, found[key]["outcome"]["artifact"])(ids).logits.detach())
        assert (logits[-1] - plain).abs().max() > 0.05
    torch.testing.assert_close(*logits, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("family", "fragment"),
    [("llama", {}), ("llama", MORAM), ("mixtral", {}), ("mixtral", ON_EXPERTS), ("qwen3_moe", {})],
    ids=["llama", "llama moram", "mixtral", "mixtral's experts", "qwen3_moe"],
)
def test_memory_is_halved_and_planned(
    family: str, fragment: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    """One worker's peak to 1 %, and its share of the base in bytes."""
    big = {"train": {"global_batch": 16, "micro_batch": 8}, "data": {"sequence_length": 256}}
    raws = [recipe_of("plan", strategy, 2, big, fragment, model=bases[family]) for strategy in ("ddp", "fsdp2")]
    ranks = in_processes(weigh_and_measure, 2, tmp_path / "group", raws)
    for raw, *measured in zip(raws, *ranks, strict=True):
        recipe = Recipe.model_validate(raw)
        session = trace_step(recipe, Target.of(recipe))
        plan = make_plan(session, Target.of(recipe), None)
        assert [peak for peak, _ in measured] == pytest.approx([plan.step_peak_bytes] * 2, rel=0.01)
        assert max(weights for _, (weights, _) in measured) == session.state["weights"]
    (_, (_, whole)), (_, (_, share)) = ranks[0]
    assert share == pytest.approx(whole / 2, rel=0.02)

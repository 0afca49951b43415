"""Planning as a user meets it: in a process of its own, remembered, and with errors that say what to do."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import BudgetError, ModelError, PlanError
from raymem.planner import Planner, known_plan, plan_recipe, prediction_error, process
from raymem.planner.subprocess_main import answer, describe
from raymem.planner.types import Above, Plan
from raymem.recipe.schema import Recipe
from tests.helpers.planner_cases import MORAM, case, model_config
from tests.helpers.support import make_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))


def planned(recipe: Recipe, gpu: str | None = None, *, traced: bool = True) -> Plan:
    """Planned in this process."""
    plan = Plan(**answer({"recipe": recipe.to_dict(), "gpu": gpu, "rows": None, "problem": None})["plan"])
    assert plan.traced == traced, plan.note
    return plan


def test_a_plan_is_made_in_a_process_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = case("lora")
    made = plan_recipe(recipe)
    assert made.traced and made.peak_bytes == sum(made.terms.values())
    assert {"load", "forward", "backward", "step", "save"} == set(made.phases)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a remembered plan needs no process")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert plan_recipe(recipe) == made == known_plan(recipe)
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict()
    with pytest.raises(AssertionError, match="no process"):
        plan_recipe(case("lora checkpoint"))


def test_a_model_id_without_a_network_says_what_to_pass() -> None:
    found = answer(
        {"recipe": make_recipe(model="nobody/nothing").to_dict(), "gpu": None, "rows": None, "problem": None}
    )
    with pytest.raises(
        ModelError, match=r"'nobody/nothing' is no local directory .*give a path that holds config.json"
    ):
        raise process._result(found)  # type: ignore[misc]


def test_an_unknown_gpu_is_refused_before_anything_runs() -> None:
    with pytest.raises(BudgetError, match="known are"):
        plan_recipe(case("lora"), gpu="H1000")


def test_model_code_that_decides_by_values_gives_a_rough_figure_and_the_operation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def deciding(self: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return forward(self, x, **kwargs) if not x.sum().isnan().item() else x

    monkeypatch.setattr(LlamaDecoderLayer, "forward", deciding)
    recipe = case("lora")
    rough = planned(recipe, traced=False)
    assert rough.note is not None and "_local_scalar_dense" in rough.note
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    exact = planned(recipe)
    assert rough.state == exact.state
    assert 0.4 < rough.peak_bytes / exact.peak_bytes < 2.5


def test_other_errors_are_named() -> None:
    assert describe(TypeError("no such thing\nmore")) == "TypeError: no such thing"


def test_a_process_that_dies_leaves_a_rough_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str | None] = []

    class Dying:
        def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
            given.append(job["problem"])
            return answer(job) if job["problem"] else None

        def close(self) -> int:
            return -6

    monkeypatch.setattr(process, "PlannerProcess", Dying)
    plan = plan_recipe(case("lora"))
    assert given == [None, "the model's code ended the planning process (SIGABRT)"]
    assert not plan.traced and plan.note == given[1]


def test_a_process_that_took_too_long_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its death would be taken for that of the next recipe, which would be left with a rough figure."""
    begun: list[Slow] = []

    class Slow:
        def __init__(self) -> None:
            self.ended = False
            begun.append(self)

        def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
            if len(begun) == 1:
                self.ended = True
                raise PlanError("took more than 0 s")
            return None if self.ended else answer(job)

        def close(self) -> int:
            return -9

    monkeypatch.setattr(process, "PlannerProcess", Slow)
    with Planner() as planner:
        with pytest.raises(PlanError, match="took more than 0 s"):
            planner.plan(case("lora"))
        assert planner.plan(case("lora")).traced
    assert len(begun) == 2


def test_one_process_plans_many_and_what_takes_no_memory_is_planned_once() -> None:
    with Planner() as planner:
        first = planner.plan(case("lora"))
        child = planner._child
        other_lr = make_recipe(case("lora").to_dict(), {"optimizer": {"lr": 0.5}})
        assert planner.plan(other_lr) == first == known_plan(other_lr)
        assert planner.plan(case("lora checkpoint")).peak_bytes < first.peak_bytes
        above = planner.plan_within(case("lora bf16"), first.peak_bytes // 4)
        assert isinstance(above, Above) and above.phase == "forward" and known_plan(case("lora bf16")) is None
        assert planner._child is child is not None
    assert planner._child is None and child._process.returncode == 0


def test_what_the_process_does_without_changes_no_plan() -> None:
    """The second recipe asks for PyTorch's compiler, which the process had put off until then, the third for it all."""
    several = {"scaling": {"num_workers": 2}, "train": {"global_batch": 8}}
    with Planner() as planner:
        for recipe in (case("lora"), case("full foreach"), make_recipe(case("lora").to_dict(), several)):
            made = planner.plan(recipe)
            assert dataclasses.replace(made, seconds=0.0) == dataclasses.replace(planned(recipe), seconds=0.0)


def test_planning_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(PlanError, match="took more than 0 s"):
        plan_recipe(case("lora"), timeout_s=0.01)


def test_on_a_gpu_the_allocator_and_what_lies_outside_are_counted() -> None:
    cpu = planned(case("lora bf16 checkpoint"))
    assert cpu.capacity_bytes == cpu.peak_bytes
    gpu = make_recipe(case("lora bf16 checkpoint").to_dict(), {"scaling": {"use_gpu": True}})
    plan = planned(gpu, "A100-80GB")
    assert plan.device == "cuda"
    assert plan.reserved_bytes >= plan.peak_bytes
    assert plan.peak_bytes < plan.capacity_bytes <= plan.reserved_bytes + plan.outside_bytes


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_replicas_keep_buckets_and_shards_share(strategy: str) -> None:
    alone = planned(case("full"))
    several = {"scaling": {"num_workers": 4, "strategy": strategy}, "train": {"global_batch": 8}}
    plan = planned(make_recipe(case("full").to_dict(), several))
    if strategy == "ddp":
        assert plan.state == alone.state
        buckets = alone.state["gradients"]
        head = model_config("llama", 2)["vocab_size"] * model_config("llama", 2)["hidden_size"] * 4
        assert plan.phases["forward"]["gradients"] == buckets + head, "buckets stay; the loss brings its gradient"
    else:
        for term in ("trainable", "gradients", "optimizer"):
            assert plan.state[term] == pytest.approx(alone.state[term] / 4, rel=0.01)


def test_evaluation_and_what_comes_before_a_step_are_phases_of_their_own() -> None:
    gradient = {**MORAM["adapter"], "criterion": "gradient"}
    raw = {"adapter": gradient, "data": {"eval": "eval.jsonl"}}
    recipe = make_recipe(case("lora").to_dict(), raw)
    phases = planned(recipe).phases
    assert phases["evaluation"]["peak_bytes"] < phases["forward"]["peak_bytes"]
    assert phases["before_step"]["peak_bytes"] > phases["load"]["peak_bytes"]
    continued = planned(make_recipe(recipe.to_dict(), {"adapter": {"init_from": "adapter"}}))
    assert "before_step" not in continued.phases, "it goes on with the connections that it has"


def test_a_selection_in_the_middle_of_a_run_is_planned_beside_the_optimizer_state() -> None:
    once = make_recipe(case("lora").to_dict(), {"adapter": {**MORAM["adapter"], "criterion": "gradient"}})
    again = planned(make_recipe(once.to_dict(), {"adapter": {"refresh_every": 100}}))
    state = again.state["optimizer"]
    assert state > 0
    assert again.phases["before_step"]["peak_bytes"] == planned(once).phases["before_step"]["peak_bytes"] + state


def test_three_blocks_of_a_selections_gradient_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from raymem.memory.target import worth_visiting
    from raymem.methods.moram import selection

    recipe = make_recipe(case("lora").to_dict(), {"adapter": {**MORAM["adapter"], "criterion": "gradient"}})
    monkeypatch.setattr(selection, "rows_at_once", lambda *_: 16)
    visited: set[int] = set()

    def counted(starts: Any) -> Any:
        visited.add(len(worth_visiting(starts)))
        return worth_visiting(starts)

    monkeypatch.setattr(selection, "worth_visiting", counted)
    few = planned(recipe)
    assert visited == {3}
    monkeypatch.setattr(selection, "worth_visiting", lambda starts: starts)
    assert planned(recipe).phases == few.phases


def test_the_choice_of_ranks_is_planned() -> None:
    auto = {"activations": {"kind": "loract", "rank": "auto", "max_rank": 0.125}}
    recipe = make_recipe(case("loract layer").to_dict(), auto)
    plan, fixed = planned(recipe), planned(case("loract layer"))
    assert "before_step" not in fixed.phases
    assert plan.phases["load"]["peak_bytes"] < plan.phases["before_step"]["peak_bytes"] < plan.peak_bytes
    assert plan.step_peak_bytes == fixed.step_peak_bytes, "at the highest ranks that are allowed"


def test_calibration_is_the_mean_ratio_of_a_method() -> None:
    recipe = case("lora checkpoint")
    assert prediction_error.ratio(recipe) is None
    prediction_error.record(recipe, 100, 104)
    prediction_error.record(recipe, 100, 100)
    ratio, runs = prediction_error.ratio(recipe) or (0.0, 0)
    assert ratio == pytest.approx(1.02) and runs == 2
    assert prediction_error.ratio(case("lora")) is None


def llama(shape: tuple[int, ...], ratio: float, directory: Path) -> Any:
    """LoRAM's plan of a Llama, whose pruned config is written to ``directory``."""
    from transformers import LlamaConfig

    from raymem.methods.loram.config import PruneOptions
    from raymem.methods.loram.nonuniform import with_counts
    from raymem.methods.loram.pruning.plan import plan_pruning

    hidden, layers, heads, groups, neurons, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        intermediate_size=neurons, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    pruning = plan_pruning(config, PruneOptions(ratio=ratio))
    with_counts(config, pruning.counts).save_pretrained(directory)
    return pruning


def weights(model: Path, quantize: str) -> int:
    from raymem.planner.analytic import closed_form
    from raymem.planner.tracing.step_trace import planned_model
    from raymem.planner.types import Target

    recipe = make_recipe({"base": {"quantize": quantize}, "train": {"precision": "bf16"}}, model=model)
    buffers = 4 * 64 * 2  # rotary frequencies, twice
    return closed_form(recipe, Target("cpu", 1), planned_model(recipe))["weights"] - buffers


LLAMA_2_13B = (5120, 40, 40, 40, 13824, 32000)
LLAMA_2_70B = (8192, 80, 64, 8, 28672, 32000)
LLAMA_31_70B = (8192, 80, 64, 8, 28672, 128256)


@pytest.mark.parametrize(
    ("shape", "ratio", "parameters", "paper"),
    [
        (LLAMA_2_13B, 0.65, 6_005_662_720, 8.67),
        (LLAMA_2_70B, 0.85, 16_272_924_672, 16.95),
        (LLAMA_31_70B, 0.85, 17_849_982_976, 15.81),
    ],
)
def test_published_loram_counts_come_out_of_the_planner(
    shape: tuple[int, ...], ratio: float, parameters: int, paper: float, tmp_path: Path
) -> None:
    """LoRAM, table 1, which counts every parameter at 4 bits and scales as free."""
    full = llama(shape, ratio, tmp_path).full.bf16_bytes
    assert weights(tmp_path, "none") == 2 * parameters
    assert round(full / (parameters / 2), 2) == paper


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "ratio", "stored"),
    [(LLAMA_2_13B, 0.65, 7.26), (LLAMA_2_70B, 0.85, 15.04), (LLAMA_31_70B, 0.85, 11.45)],
)
def test_what_bitsandbytes_stores_of_a_pruned_llama(
    shape: tuple[int, ...], ratio: float, stored: float, tmp_path: Path
) -> None:
    """Layers in 4 bits with their scales and tables; embeddings, head and norms stay in bf16."""
    pytest.importorskip("bitsandbytes")
    full = llama(shape, ratio, tmp_path).full.bf16_bytes
    assert full / weights(tmp_path, "nf4") == pytest.approx(stored, abs=0.01)

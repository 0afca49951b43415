"""General claims, for every architecture of the list: what raymem says of a model holds, or it is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import ModelError, RecipeError
from raymem.methods.peft.files import load_adapter
from raymem.methods.peft.linear_layers import linear_layers, routed_experts, text_pass
from raymem.recipe.schema import Recipe
from raymem.training.data.batches import Batch
from raymem.training.dist_env import DistEnv, replicate
from raymem.training.loss import forward_loss_sum, loss_of
from raymem.training.model.build import build_model
from raymem.training.model.summary import what_is_trained
from raymem.training.optim import build_updater
from raymem.training.step import train_step
from tests.helpers import families
from tests.helpers.families import FAMILIES, VOCABULARY
from tests.helpers.support import column, in_processes, make_recipe, num_targets, random_batch, run_fragment, train

FULL: dict[str, Any] = {"adapter": "none"}
NONE: dict[str, Any] = {"data": {"packing": "none"}}
HYBRID = {"lfm2", "minimax", "jamba", "bamba", "zamba2", "falcon_h1", "granitemoehybrid", "nemotron_h",
          "recurrent_gemma", "qwen3_next", "qwen3_5_text"}  # fmt: skip
RECURRENT = {"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"}
NO_POSITION_IDS = {"opt", "biogpt", "xglm", "openai-gpt", "bloom", "mpt", "falcon", "falcon_alibi", "gpt_oss", "afmoe"}
"""Those whose attention looks past the position ids."""

SCANNED = {"mamba", "falcon_mamba", "jamba"}
"""Those whose backward goes token by token without a kernel, and frees a little sooner than is planned."""
UNTRACED = {"longcat_flash", "jetmoe"}
"""Those whose experts are chosen by values, so that their plans are rough figures, which say so."""
NOT_LOADED = {"mllama"}
"""Those that transformers itself does not load as causal language models from what it has saved."""

LIKE_OTHERS = {
    *("gemma", "olmo", "olmo2", "glm", "smollm3", "seed_oss", "helium", "arcee", "apertus", "ernie4_5", "doge"),
    *("hunyuan_v1_dense", "bitnet", "stablelm", "starcoder2", "nemotron", "ministral", "cohere2", "exaone4", "xglm"),
    *("vaultgemma", "olmoe", "flex_olmo", "minimax_m2", "deepseek_v2", "glm4_moe", "hunyuan_v1_moe", "falcon_alibi"),
    *("falcon_mamba", "bamba", "zamba2", "gpt_neo", "codegen", "openai-gpt"),
}
"""Those that differ little from another one of the list: for the slow tier."""
ALL = [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in FAMILIES]
LOADED = [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in FAMILIES
          if name not in NOT_LOADED]  # fmt: skip


def test_the_list_is_long_and_of_every_kind() -> None:
    assert len(FAMILIES) >= 80 and len(set(FAMILIES) - LIKE_OTHERS) >= 50 and set(FAMILIES) >= LIKE_OTHERS
    assert set(families.SOME) | HYBRID | RECURRENT | NO_POSITION_IDS <= set(FAMILIES)


def inputs(length: int = 12) -> dict[str, Any]:
    ids = torch.randint(3, 120, (2, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "use_cache": False}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the size of the logits."""
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**inputs()).logits
    return found


@pytest.mark.parametrize("name", ALL)
def test_base_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = families.save(tmp_path, name)
    if name in NOT_LOADED:
        with pytest.raises(ModelError, match="Unrecognized configuration class"):
            build_model(make_recipe(FULL, NONE, model=directory))
        return
    model = build_model(make_recipe(FULL, NONE, model=directory))
    close(logits(model), logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)))


@pytest.mark.parametrize("name", ALL)
def test_packed_examples_are_kept_apart_or_refused(name: str) -> None:
    """What the probe says of a clone is what the model itself does with the batch of a training step."""
    recipe = make_recipe(families.fragment(name), FULL)
    model: Any = build_model(recipe).eval()
    batch = random_batch(2, 24)
    ids = batch.input_ids.clone()
    ids[:, :12] = (ids[:, :12] + 1) % VOCABULARY
    changed = Batch(ids, batch.labels, batch.position_ids, None)
    with torch.no_grad():
        one, other = (model(**b.model_inputs()).logits[:, 12:] for b in (batch, changed))
    leaks = not torch.allclose(one, other, atol=1e-5)
    assert leaks == (name in HYBRID | RECURRENT | NO_POSITION_IDS)
    packed = make_recipe(recipe.to_dict(), {"data": {"packing": "bfd"}})
    if leaks:
        with pytest.raises(RecipeError, match=r"data\.packing: bfd does not keep .* apart in \w+: .*; use data"):
            build_model(packed, meta=True)
    else:
        build_model(packed, meta=True)
    build_model(make_recipe(recipe.to_dict(), {"data": {"packing": "wrapped"}}), meta=True)  # isolates nothing


def loss_and_gradients(recipe: Recipe, kind: str) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    model = build_model(Recipe.model_validate({**recipe.to_dict(), "loss": kind})).eval()
    loss = forward_loss_sum(model, random_batch(2, 12, packed=False), mixed=False)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values()), "DDP would wait for the others"
    return model, loss.detach(), gradients  # type: ignore[return-value]


@pytest.mark.parametrize("name", ALL)
def test_the_chunked_loss_is_the_full_one_or_auto_says_full(name: str, caplog: pytest.LogCaptureFixture) -> None:
    recipe = make_recipe(families.fragment(name), FULL)
    _, expected, gradients = loss_and_gradients(recipe, "full")
    with caplog.at_level(logging.WARNING):
        model, loss, found = loss_and_gradients(recipe, "auto")
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert found.keys() == gradients.keys()
    missed = sum(float((found[n] - g).square().sum()) for n, g in gradients.items())
    assert missed <= 1e-8 * sum(float(g.square().sum()) for g in gradients.values())
    note = loss_of(model).note
    assert loss_of(model).chunked == (note is None)
    assert note is None or note in caplog.text


@pytest.mark.parametrize("name", LOADED)
def test_lora_on_all_linear_layers(name: str, tmp_path: Path) -> None:
    """Every layer that text uses, or a reason; a step moves every adapter; plain PEFT loads and merges what it left."""
    from transformers import AutoModelForCausalLM

    base = families.save(tmp_path / "base", name)
    recipe = make_recipe(NONE, model=base)
    model: Any = build_model(recipe)
    bare = model.get_base_model()
    verdict = text_pass(bare)
    assert verdict.reason is None
    adapted = {n.split(".lora_")[0].removeprefix("base_model.model.") for n, p in model.named_parameters()
               if p.requires_grad}  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert adapted == {name for name in linear_layers(plain) if verdict.why_left_alone(name) is None}
    assert adapted
    updater = build_updater(model, recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for step in range(2):  # in the first one B is zero, and A has no gradient
        batch = random_batch(4, 24, step, packed=False)
        train_step(model, [batch], num_targets(batch), updater, step, 1e-2)
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert not still
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    loaded = load_adapter(plain, tmp_path / "adapter", "cpu")
    close(logits(loaded), expected)
    merged = logits(loaded.merge_and_unload())
    assert float((merged - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))
    lines = [str(line) for line in what_is_trained(model, recipe)]
    assert lines[0].startswith(f"adapted (lora) ({len(adapted)}): ")
    assert any("routed experts are no linear layers" in line for line in lines) == bool(routed_experts(plain))


def gradients_of_two_workers(raw: dict[str, Any]) -> list[str]:
    """Two steps under DDP, which raises in the second where a parameter had no gradient in the first."""
    recipe = Recipe.model_validate(raw)
    dist_env = DistEnv.current(recipe)
    model = build_model(recipe, dist_env)
    wrapped, updater = replicate(model, dist_env), build_updater(model, recipe)
    for step in range(2):
        batch = random_batch(2, 12, step + 2 * dist_env.rank, packed=False)
        train_step(wrapped, [batch], 2 * num_targets(batch), updater, step, 1e-2)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("name", ["gemma3", "mllama", "mamba"])
def test_two_workers_train_what_one_does(name: str, adapter: str, tmp_path: Path) -> None:
    recipe = make_recipe(families.fragment(name), {"adapter": adapter, "scaling": {"num_workers": 2}})
    ranks = in_processes(gradients_of_two_workers, 2, tmp_path, recipe.to_dict())
    alone = build_model(make_recipe(families.fragment(name), {"adapter": adapter}))
    assert ranks[0] == ranks[1] == [name for name, p in alone.named_parameters() if p.requires_grad]
    assert not any("vision" in name or "cross_attn" in name for name in ranks[0])


@pytest.mark.parametrize("name", ["mamba", "gemma3", "qwen3_moe", pytest.param("rwkv", marks=pytest.mark.slow),
                                  pytest.param("qwen3_next", marks=pytest.mark.slow)])  # fmt: skip
def test_a_run_goes_on_as_if_it_had_not_stopped(name: str, examples: Path, llama: Path, tmp_path: Path) -> None:
    own = families.fragment(name)
    own["model"]["tokenizer"] = str(llama)
    often = {"train": {"save_every": 1}}
    whole = train(make_recipe(own, often, run_fragment(examples, tmp_path / "whole")))[1]
    stopped = make_recipe(own, often, run_fragment(examples, tmp_path / "stopped"))
    rows = train(stopped, stop_after=3)[1] + train(stopped)[1]
    assert column(rows) == column(whole)


PLANNED = ("gpt_oss", "gemma3", "bloom", "qwen3_moe")


@pytest.mark.parametrize("name", [n if n in PLANNED else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_the_planner_predicts_the_step_or_says_that_it_is_rough(name: str, planned_here: None) -> None:
    from raymem.planner import plan_recipe
    from raymem.testing.measure import measure_step

    own = {"loss": "full", "data": {"sequence_length": 64}, "adapter": "none"}
    recipe = make_recipe(families.fragment(name), own)
    plan = plan_recipe(recipe)
    if name in UNTRACED:
        assert not plan.traced and "decides by values" in (plan.note or "")
        return
    assert plan.traced, plan.note
    measured = measure_step(recipe).allocated_bytes
    tolerance = 0.1 if name in SCANNED else 0.02
    assert abs(plan.step_peak_bytes - measured) <= tolerance * measured, (plan.step_peak_bytes, measured)

"""Adapters that plain PEFT wrote, with whatever options: evaluated, merged and generated with as PEFT has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import ModelError
from raymem.methods.plain.losses import FullLoss, FullLossKind
from raymem.recipe.schema import Recipe
from raymem.runs.evaluate import evaluate_recipe
from raymem.training.artifacts.generate import generate
from raymem.training.artifacts.load import load_artifact
from raymem.training.artifacts.merge import merge
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.dist_env import DistEnv
from raymem.training.evaluate import evaluate
from raymem.training.loss import prepare
from raymem.training.model.build import build_model
from tests.helpers.support import make_recipe, prepare_split, run_fragment, save_model, save_tokenizer

LINEAR = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "modules_to_save": ("llama", {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}),
    "rank_pattern": (
        "llama",
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}},
    ),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "bias": ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "all"}),
    "bias of its own": ("gpt_neox", {"target_modules": ["dense"], "lora_bias": True}),
    "experts": ("qwen3_moe", {"target_modules": "all-linear"}),  # PEFT adds a rank_pattern and target_parameters
    "experts by name": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
}


def save_foreign(folder: Path, name: str) -> tuple[Path, Path]:
    """Base and adapter directory; every value of the adapter is random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    family, options = ADAPTERS[name]
    base = save_model(folder / "base", family)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    model.save_pretrained(folder / "adapter")
    save_tokenizer(folder / "adapter")
    return base, folder / "adapter"


def recipe_of(base: Path, examples: Path, storage: Path) -> Recipe:
    return make_recipe(run_fragment(examples, storage, evaluated=True), {"data": {"packing": "none"}}, model=base)


def by_peft(base: Path, adapter: Path, recipe: Recipe) -> float:
    """Evaluation loss of the model that plain PEFT loads."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    prepare(model, FullLossKind(), FullLoss())
    rows = PackedRows(prepare_split(recipe, "eval").directories)
    return evaluate(model, rows, DistEnv(), micro_batch=2, mixed=False).loss


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_evaluated_as_plain_peft_has_it_and_merged_and_generated_with(
    name: str, examples: Path, tmp_path: Path
) -> None:
    base, adapter = save_foreign(tmp_path, name)
    recipe = recipe_of(base, examples, tmp_path / "runs")
    expected = by_peft(base, adapter, recipe)
    assert expected != pytest.approx(evaluate_recipe(recipe, "base").result.loss, rel=1e-4)
    assert evaluate_recipe(recipe, str(adapter)).result.loss == pytest.approx(expected, rel=1e-6)
    assert generate(adapter, "w1 w2", max_new_tokens=2, temperature=0.0, seed=0).text
    merged = merge(adapter, tmp_path / "merged")
    assert evaluate_recipe(recipe, str(merged)).result.loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["rslora", "modules_to_save", "experts"])
def test_what_cannot_be_continued_says_so_with_a_cure_that_works(name: str, examples: Path, tmp_path: Path) -> None:
    base, adapter = save_foreign(tmp_path, name)
    continued = {"adapter": {"rank": 4, "alpha": 8.0, "targets": LINEAR[:2], "init_from": str(adapter)}}
    with pytest.raises(ModelError, match=rf"adapter\.init_from: .*merge it \(raymem merge {adapter} -o MERGED\)"):
        build_model(make_recipe(continued, {"data": {"packing": "none"}}, model=base))
    merged = merge(adapter, tmp_path / "merged")
    model = build_model(make_recipe({"data": {"packing": "none"}}, model=merged))
    inputs = {"input_ids": torch.arange(3, 15)[None], "use_cache": False}
    with torch.no_grad():
        expected = load_artifact(adapter)[0](**inputs).logits
        torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_base_is_one_sentence(examples: Path, tmp_path: Path) -> None:
    _, adapter = save_foreign(tmp_path, "rslora")
    wider = save_model(tmp_path / "wider", "llama", hidden_size=64)
    with pytest.raises(ModelError, match=r"PEFT cannot put this adapter on LlamaForCausalLM: RuntimeError: .*; give"):
        evaluate_recipe(recipe_of(wider, examples, tmp_path / "runs"), str(adapter))


@pytest.mark.parametrize("kind", ["bias without a place", "prompt"])
def test_what_peft_cannot_merge_is_one_sentence_and_still_used(kind: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = save_model(tmp_path / "base")
    config: Any = (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        if kind == "prompt"
        else LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    save_tokenizer(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapter: PEFT cannot merge this adapter: \w+: .*; use it beside its base"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert generate(tmp_path / "adapter", "w1 w2", max_new_tokens=2, temperature=0.0, seed=0).text

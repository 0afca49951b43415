"""Two ranks that share a 4-bit base evaluate what one process with the whole base does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from raymem.recipe.schema import Recipe
from raymem.runs.evaluate import evaluate_recipe, evaluation_task
from raymem.training.data.packed.shared import to_dict
from raymem.training.dist_env import DistEnv
from raymem.training.reporter import LocalReporter
from tests.helpers import families
from tests.helpers.peft_adapters import save_peft
from tests.helpers.support import (
    in_processes,
    make_recipe,
    prepare_split,
    run_fragment,
    save_model,
    save_tokenizer,
    train,
    write_examples,
)
from tests.runs.inference.test_group import MORAM

pytestmark = pytest.mark.slow
pytest.importorskip("bitsandbytes")

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32}


def evaluations(configs: list[dict[str, Any]]) -> list[Any]:
    dist_env = DistEnv.of(Recipe.model_validate(configs[0]["recipe"]).scaling)
    return [evaluation_task(config, dist_env, LocalReporter().progress) for config in configs]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_losses_are_those_of_the_whole_base(family: str, tmp_path: Path) -> None:
    write_examples(tmp_path / "train.jsonl", 12, seed=0)
    write_examples(tmp_path / "eval.jsonl", 5, seed=1)
    if family == "llama":
        base = save_model(tmp_path / "base", **WIDE)
    else:
        base = families.save(tmp_path / "base", family, **{**WIDE, "intermediate_size": 192})
        save_tokenizer(base)
    where = run_fragment(tmp_path, tmp_path, evaluated=True)
    nf4 = {"base": {"quantize": "nf4"}, "train": {"precision": "bf16"}}
    recipe = make_recipe(where, nf4, model=base)
    lora = save_peft(tmp_path / "lora", base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    artifacts = ["base", str(lora)]
    if family == "llama":
        outcome, _ = train(make_recipe(where, MORAM, {"train": {"steps": 2}}, model=base))
        assert outcome is not None
        artifacts.append(outcome.artifact)
    raw = recipe.to_dict()
    raw["scaling"] = {**raw["scaling"], "num_workers": 2, "strategy": "fsdp2"}
    data = to_dict(prepare_split(recipe, "eval"))
    configs = [{"recipe": raw, "artifact": artifact, "data": data, "predictions": 1} for artifact in artifacts]
    first, second = in_processes(evaluations, 2, tmp_path / "meet", configs)
    assert first == second
    losses = [evaluation.loss for evaluation, _ in first]
    expected = [evaluate_recipe(recipe, artifact).loss for artifact in artifacts]
    assert losses == pytest.approx(expected, abs=2e-3)
    assert min(abs(a - b) for a, b in pairwise(losses)) > 5e-3, "otherwise it proves little"

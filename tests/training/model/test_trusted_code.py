"""The recipe key that lets the code of a model run: without it every command refuses, with it training works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import ModelError
from raymem.recipe.schema import Recipe
from raymem.runs.evaluate import evaluate_recipe
from raymem.runs.loram.pipeline import Pipeline
from raymem.runs.plan import plan_run
from raymem.runs.train import launch
from raymem.training.artifacts.generate import generate
from tests.helpers.support import make_recipe, run_fragment

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

open({ran!r}, "a").close()


class Config(LlamaConfig):
    model_type = "nowhere"


class Model(LlamaForCausalLM):
    config_class = Config
"""
COMMANDS: dict[str, Callable[[Recipe], Any]] = {
    "train": launch,
    "plan": plan_run,
    "evaluate": lambda recipe: evaluate_recipe(recipe, "base"),
    "generate": lambda recipe: generate(str(recipe.model.name), "w1", max_new_tokens=1, temperature=0, seed=0),
    "prune": lambda recipe: Pipeline(recipe).prune(),
}


@pytest.fixture
def own(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of an architecture that only its own code knows; running it leaves the file ``ran``."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = Path(shutil.copytree(llama, tmp_path / "own"))
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "nowhere", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_in_a_sentence(own: Path, examples: Path, tmp_path: Path, command: str) -> None:
    base = {"base": {"kind": "loram", "criterion": "random", "ratio": 0.5}} if command == "prune" else {}
    recipe = make_recipe(run_fragment(examples, tmp_path / "runs", evaluated=True), base, model=own)
    with pytest.raises(
        ModelError, match=rf"{own} brings code of its own \(auto_map in .*\), which raymem does not run"
    ):
        COMMANDS[command](recipe)
    assert not (tmp_path / "ran").exists()


def test_with_the_key_it_is_said_and_trained(own: Path, examples: Path, tmp_path: Path) -> None:
    trusting = {"model": {"trust_remote_code": True}, "data": {"packing": "none"}}
    recipe = make_recipe(run_fragment(examples, tmp_path / "runs", evaluated=True), trusting, model=own)
    said: list[str] = []
    result = launch(recipe, status=said.append)
    assert result.loss is not None and result.eval_loss is not None
    assert (tmp_path / "ran").exists()
    note = f"model.trust_remote_code: code that {own} brings runs with all your rights, here and on workers"
    assert said.count(note) == 1
    assert evaluate_recipe(recipe).loss == pytest.approx(result.eval_loss)
    with pytest.raises(ModelError, match="brings code of its own"):  # no recipe says that this code is trusted
        generate(result.artifact, "w1", max_new_tokens=1, temperature=0, seed=0)

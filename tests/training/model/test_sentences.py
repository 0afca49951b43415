"""What does not go with a model is said before data are prepared, and what libraries raise is said in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.cluster.doctor.local import check_model
from raymem.errors import ModelError, RecipeError
from raymem.methods.sentences import as_sentence, first_step
from raymem.runs.train import launch
from raymem.training.model.build import build_model
from raymem.training.model.summary import what_is_trained
from tests.helpers import families
from tests.helpers.support import make_recipe, run_fragment, save_tokenizer, train

LEAKS = r"data\.packing: bfd does not keep the examples of a row apart in OPTForCausalLM: .*; use data\.packing: none"


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that does not keep packed examples apart."""
    directory = families.save(tmp_path_factory.mktemp("models") / "opt", "opt")
    save_tokenizer(directory)
    return directory


def test_packing_that_leaks_is_refused_before_data_are_prepared(opt: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing.jsonl").touch()  # there, and refused if anybody read it
    data = {"data": {"train": str(tmp_path / "nothing.jsonl")}, "storage": {"path": str(tmp_path)}}
    with pytest.raises(RecipeError, match=LEAKS):
        launch(make_recipe(data, model=opt))
    with pytest.raises(RecipeError, match=LEAKS):
        launch(make_recipe(data, {"data": {"packing": "bfd"}}, model=opt))


@pytest.mark.usefixtures("planned_here")
def test_a_plan_and_the_doctor_say_so_too(opt: Path) -> None:
    from raymem.planner import plan_recipe

    with pytest.raises(RecipeError, match=LEAKS):
        plan_recipe(make_recipe(model=opt))
    (check,) = check_model(make_recipe(model=opt))
    assert (check.ok, check.cure) == (False, "use data.packing: none")
    (check,) = check_model(make_recipe({"data": {"packing": "wrapped"}}, model=opt))
    assert check.ok


def test_a_run_and_a_plan_say_what_is_adapted_and_what_is_not(
    examples: Path, llama: Path, tmp_path: Path, planned_here: None
) -> None:
    from raymem.planner import plan_recipe

    own = families.fragment("qwen3_moe")
    own["model"]["tokenizer"] = str(llama)
    recipe = make_recipe(own, run_fragment(examples, tmp_path), {"train": {"steps": 1, "precision": "bf16"}})
    said: list[str] = []
    launch(recipe, status=said.append)
    adapted, alone = (line for line in said if line.startswith(("adapted", "left alone")))
    assert adapted == "adapted (lora) (8): q_proj, k_proj, v_proj, o_proj"
    assert alone.startswith("left alone (4): experts.gate_up_proj, experts.down_proj - routed experts are no linear")
    assert plan_recipe(recipe).trained == [adapted, alone]


@pytest.mark.parametrize(
    ("family", "adapter", "message"),
    [
        ("mamba", {"targets": ["out_proj"]}, r"'out_proj' matches only layers .* MambaMixer reads its weight"),
        ("gemma3", {"targets": [".*vision_tower.*fc1"]}, r"text does not pass through it; leave it out"),
        ("qwen3_next", {"targets": ["shared_expert.up_proj"]}, r"PEFT takes the name for one of routed experts"),
        ("llama4_text", {"targets": ["router"]}, r"it gives a tuple, no tensor; leave it out"),
        ("qwen3_moe", {"targets": ["experts.down_proj"], "dropout": 0.1}, r"adapter: PEFT refuses it for Qwen3Moe.*: "
         r"ValueError: lora\.ParamWrapper does not work with lora_dropout != 0\.; change adapter\.targets"),
        ("qwen3_moe", {"kind": "moram", "rank": 2, "density": 0.1, "criterion": "random",
                       "targets": ["experts.down_proj"]}, r"holds routed experts, and MoRAM adapts linear layers"),
    ],
)  # fmt: skip
def test_targets_that_take_no_adapter_say_why(family: str, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_model(make_recipe(families.fragment(family), {"adapter": adapter}), meta=True)


def test_an_error_of_the_model_in_the_first_step_is_a_sentence(
    examples: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    def broken(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("'tuple' object has no attribute 'dtype'")

    recipe = make_recipe(
        run_fragment(examples, tmp_path), {"loss": "full", "adapter": {"targets": ["up_proj"]}}, model=llama
    )
    build_model(recipe, meta=True)  # asks its clone
    monkeypatch.setattr(LlamaAttention, "forward", broken)
    with pytest.raises(ModelError, match=r"first step of .* failed: AttributeError: 'tuple' object has no .*; try"):
        train(recipe)


def test_the_words_of_a_library_stay_and_errors_of_ours_pass() -> None:
    with (
        pytest.raises(ModelError, match=r"here: KeyError: 'x'; do that") as caught,
        as_sentence(ModelError, "here", "do that"),
    ):
        raise KeyError("x")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RecipeError, match=r"^mine$"), as_sentence(ModelError, "here", "do that"):
        raise RecipeError("mine")
    with pytest.raises(RuntimeError, match="later"), first_step(torch.nn.Identity(), is_first=False):
        raise RuntimeError("later")


@pytest.mark.parametrize("planned", [True, False])
def test_the_lines_say_what_is_in_4_bits(planned: bool, tmp_path: Path) -> None:
    if not planned:
        pytest.importorskip("bitsandbytes")
    base = families.save(tmp_path, "qwen3_moe", hidden_size=64, head_dim=16)
    recipe = make_recipe({"base": {"quantize": "nf4"}, "train": {"precision": "bf16"}}, model=base)
    lines = [str(line) for line in what_is_trained(build_model(recipe, meta=True, planned=planned), recipe)]
    assert lines[2:] == [
        "in 4 bits (8): q_proj, k_proj, v_proj, o_proj",
        "in 4 bits (4): experts.gate_up_proj, experts.down_proj",
        "not in 4 bits (1): lm_head - transformers keeps the output head and what is tied to it",
    ]

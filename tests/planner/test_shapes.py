"""Models whose Hub cannot be asked: what ships is what was published, and is used only then."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import ModelError
from raymem.methods.loram.nonuniform import meta_model
from raymem.planner import Planner, plan_recipe, process, shapes
from raymem.planner.subprocess_main import answer
from raymem.planner.types import Above
from raymem.recipe.schema import Recipe
from raymem.training.model.build import load_config
from tests.helpers.support import make_recipe

PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-Instruct-2409": 22_247_282_688,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
}
"""Parameters by the index of the published weights, tied ones once. (Gemma 3 from 4B on has a vision tower, which
``AutoModelForCausalLM`` loads too.)"""


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing remembered, neither plans nor downloads."""
    from huggingface_hub import constants

    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "plans"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    process._say_once.cache_clear()
    return tmp_path / "hub"


def recipe_of(model: str, **sections: Any) -> Recipe:
    small = {
        "data": {"sequence_length": 64},
        "train": {"precision": "bf16", "global_batch": 1},
        "activations": "checkpoint",
    }
    return make_recipe({"model": {"name": model}}, small, sections)


def answered(recipe: Recipe) -> dict[str, Any]:
    return answer({"recipe": recipe.to_dict(), "gpu": None, "rows": None, "problem": None})


def hub_says(status: int) -> Callable[..., Any]:
    """A Hub that refuses."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    client = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")

    def refuse(*arguments: Any, **options: Any) -> Any:
        response = client.Response(status, request=client.Request("GET", "https://huggingface.co/x"))
        raise (RepositoryNotFoundError if status == 404 else GatedRepoError)(
            f"{status} Client Error", response=response
        )

    return refuse


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_shipped_shape_has_the_published_number_of_parameters(model: str) -> None:
    located, note = shapes.located(recipe_of(model))
    assert note is not None
    counted = sum(math.prod(p.shape) for p in meta_model(load_config(located)).parameters())
    assert counted == PUBLISHED[model]


def test_every_shape_is_among_those_whose_parameters_are_counted() -> None:
    for shape in shapes._shipped()["shapes"]:
        assert set(shape["models"]) & set(PUBLISHED), shape["models"]
    assert len(shapes.shipped_models()) == sum(len(shape["models"]) for shape in shapes._shipped()["shapes"])


def test_a_config_is_read_as_from_a_file(tmp_path: Path) -> None:
    for model in ("meta-llama/Llama-3.2-1B", "google/gemma-3-4b-it", "openai/gpt-oss-20b"):
        (tmp_path / "config.json").write_text(json.dumps(shapes.shipped_models()[model]))
        shipped = load_config(shapes.located(recipe_of(model))[0])
        assert shipped.to_diff_dict() == load_config(recipe_of(str(tmp_path))).to_diff_dict()


def test_without_the_hub_a_known_model_is_planned_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_of("meta-llama/Llama-3.2-1B-Instruct", base={"quantize": "nf4"})
    with caplog.at_level(logging.WARNING, "raymem"), Planner() as planner:
        plan = planner.plan(recipe)
        assert plan == planner.plan(recipe)
        assert isinstance(
            planner.plan_within(make_recipe(recipe.to_dict(), {"data": {"sequence_length": 128}}), 1), Above
        )
    assert plan.traced and plan.config_source == "shipped"
    said = [message for message in caplog.messages if not message.startswith("still planning")]  # on a busy machine
    assert plan.config_note == said[0]
    assert len(said) == 1, "once, for however many plans"
    assert said[0] == (
        "model.name: meta-llama/Llama-3.2-1B-Instruct: the Hub cannot be asked (HF_HUB_OFFLINE is set); planned from "
        f"the shape that raymem ships (as of {shapes._shipped()['as_of']})"
    )


def test_a_plan_of_a_shipped_shape_is_made_anew_once_the_hub_may_be_asked(
    monkeypatch: pytest.MonkeyPatch, planned_here: None
) -> None:
    recipe = recipe_of("Qwen/Qwen3-0.6B")
    assert plan_recipe(recipe).config_source == "shipped" and process.known_plan(recipe) is not None
    monkeypatch.setenv("HF_TOKEN", "of somebody")
    assert process.known_plan(recipe) is None


def test_a_gated_model_is_planned_and_one_that_the_hub_does_not_know_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_says(403))
    _, note = shapes.located(recipe_of("google/gemma-2-9b"))
    assert note is not None and "(403: it wants HF_TOKEN of an account that may read this model)" in note
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub_says(404))
    with pytest.raises(ModelError, match="cannot be had from the Hugging Face hub"):
        shapes.located(recipe_of("google/gemma-2-9b"))


def test_a_config_in_the_local_cache_comes_before_a_shipped_shape(own_caches: Path) -> None:
    """Even if nothing else of the model was downloaded."""
    config = {**shapes.shipped_models()["Qwen/Qwen3-0.6B"], "num_hidden_layers": 3}
    repository = own_caches / "models--Qwen--Qwen3-0.6B"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    located, note = shapes.located(recipe_of("Qwen/Qwen3-0.6B"))
    assert note is None and load_config(located).num_hidden_layers == 3


def test_other_names_keep_their_error_and_near_ones_are_named() -> None:
    for model, said in (
        ("Qwen/Qwen3-8b", "without the Hub raymem can plan Qwen/Qwen3-8B"),
        ("nobody/nothing", "HF_TOKEN$"),
    ):
        kind, text = answered(recipe_of(model))["error"]
        assert kind == "ModelError"
        with pytest.raises(ModelError, match=f"give a path that holds config.json, .*{said}"):
            raise ModelError(text)


def test_training_needs_the_model_itself() -> None:
    with pytest.raises(ModelError, match="cannot be had from the Hugging Face hub"):
        load_config(recipe_of("Qwen/Qwen3-0.6B"))


def test_a_pruned_shape_is_planned_too() -> None:
    base = {"kind": "loram", "ratio": 0.5}
    whole = answered(recipe_of("meta-llama/Llama-3.2-1B"))["plan"]
    pruned = answered(recipe_of("meta-llama/Llama-3.2-1B", base=base))["plan"]
    assert pruned["config_source"] == "shipped" and pruned["state"]["weights"] < whole["state"]["weights"]
